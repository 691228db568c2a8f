"""`PruningStage`: the common part of the learned stages, `TokenMerger` and `LayerPruner`."""

from .shared_strict_loading import StrictLoading


class PruningStage(StrictLoading):
    """A learned stage of `PrunedVLM`.

    Attributes:
        temperature: default of `forward`, > 0; training anneals it.
    """

    # `QuestionAttention` uses torch's fused attention for all of these.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.temperature = 0.1
