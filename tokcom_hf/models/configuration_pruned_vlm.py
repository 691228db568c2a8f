"""Configuration of `PrunedVLM`."""

from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_pruning_token_merger import TokenMergerConfig
from .pipeline_files import PipelineTasks
from .pruning_strategies import LAYER_STRATEGIES

MODES = ("origin", "merge_only", "soft", "hard")


def checked_mode(mode: str) -> str:
    """`mode`, if it is one of `MODES`; raises ValueError otherwise."""
    if mode not in MODES:
        raise ValueError(f"pruning_mode must be one of {', '.join(MODES)}, got {mode!r}.")
    return mode


@strict
class PrunedVLMConfig(PreTrainedConfig):
    """A vision-language model (the base), by reference, and the stages that remove its vision tokens.

    base_model_name_or_path: Hub name or absolute folder of the base. `base` means the subfolder of that name in the saved
        folder, which `save_pretrained(..., include_base=True)` writes.
    base_revision: branch, tag or commit of a base on the Hub; a commit pins the weights.
    base_included: True: the base's weights were changed, so they are saved in the folder's own weight files. False: they are
        loaded from `base_model_name_or_path`.
    base_config: the base's configuration as a dictionary.
    token_merger, layer_pruner: configurations of the learned stages as dictionaries, or None for no such stage.
    strategy: a training-free strategy instead of the learned stages: `random`, `uniform`, `pool`, `tome`, `visionzip`,
        `divprune` or `fastv`; see `pruning_strategies`.
    keep: vision tokens that the strategy keeps per image, at least 1; a smaller image keeps all of its tokens.
    strategy_layer: the layer of the language model before which `fastv` removes tokens, at least 1. An earlier layer saves
        more FLOPs, from less reliable attention.
    strategy_seed: seed of the `random` strategy.
    pruning_mode: `hard` (default; tokens are removed), `soft` (log(mask) is added to their attention scores, as in
        training), `merge_only` (stage 1 alone) or `origin` (the base as it is).
    """

    model_type = "tokcom_pruned_vlm"

    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_included: bool = False
    base_config: dict[str, Any] | None = None
    token_merger: dict[str, Any] | None = None
    layer_pruner: dict[str, Any] | None = None
    strategy: str | None = None
    keep: int | None = None
    strategy_layer: int = 2
    strategy_seed: int = 0
    pruning_mode: str = "hard"

    def __post_init__(self, **kwargs):
        self.custom_pipelines = PipelineTasks("pruned_vlm", kwargs.pop("custom_pipelines", None))
        checked_mode(self.pruning_mode)
        if self.strategy is not None and (self.keep is None or self.keep < 1):
            raise ValueError(
                f"strategy={self.strategy!r} needs keep, the tokens left per image (>= 1), got {self.keep}."
            )
        if self.strategy is None and self.keep is not None:
            raise ValueError(
                f"keep={self.keep} is the budget of a training-free strategy, and no strategy is named; learned stages have "
                "token_merger.target_merge_tokens and layer_pruner.keep_tokens."
            )
        if self.strategy is not None and (self.token_merger or self.layer_pruner):
            raise ValueError(
                "Give either a training-free strategy or the learned token_merger / layer_pruner, not both."
            )
        super().__post_init__(**kwargs)

    def tokens_kept(self, tokens: int) -> int:
        """The most vision tokens that stage 1 leaves of an image of `tokens` tokens, in every mode but `origin`."""
        if self.token_merger is not None:
            kept_of_tile = TokenMergerConfig(**self.token_merger).tokens_kept
        elif self.keep is None or self.strategy in LAYER_STRATEGIES:
            return tokens
        else:
            kept_of_tile = partial(min, self.keep)
        tile = self._tile_tokens() or tokens
        return tokens // tile * kept_of_tile(tile)

    def _tile_tokens(self) -> int | None:
        """Tokens of a tile in families that reduce every tile as an image of its own; None in other families."""
        base = self.base_config or {}
        sizes = base.get("vision_config") or {}
        if base.get("model_type") == "aya_vision":
            return (sizes["image_size"] // sizes["patch_size"] // base["downsample_factor"]) ** 2
        if base.get("model_type") == "internvl":
            (height, width), (rows, columns) = sizes["image_size"], sizes["patch_size"]
            return int(height // rows * base["downsample_ratio"]) * int(width // columns * base["downsample_ratio"])
        return None

    def make_base_config(self) -> PreTrainedConfig:
        """The VLM's configuration as an object."""
        if self.base_config is None:
            raise ValueError("This PrunedVLMConfig has no base_config; build the model with PrunedVLM.from_base.")
        values = dict(self.base_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's configuration, which generation reads."""
        return self if self.base_config is None else self.make_base_config().get_text_config(*args, **kwargs)
