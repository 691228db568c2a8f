"""`PruningStage`: the common part of the learned stages, `TokenMerger` and `LayerPruner`."""

from .shared_strict_loading import StrictLoading


class PruningStage(StrictLoading):
    """A learned stage of `PrunedVLM`.

    Attributes:
        temperature: temperature of a `forward` that is given none, > 0; training anneals it.
    """

    # With all of these `QuestionAttention` uses torch's fused attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.temperature = 0.1
