"""`TokenMerger` and `LayerPruner` under the documents' names, with the documents' arguments."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .configuration_pruning_layer_pruner import LayerPrunerConfig
from .configuration_pruning_token_merger import TokenMergerConfig
from .modeling_pruning_layer_pruner import LayerPruner
from .modeling_pruning_token_merger import TokenMerger


def _check(settings: dict[str, Any], config: type) -> None:
    """Raises TypeError for a name that is no field of `config`: a configuration would store it without effect."""
    known = {field.name for field in fields(config)}
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(
            f"{config.__name__} has no field {', '.join(map(repr, unknown))}; its docstring lists the fields."
        )


def LearnableTokenMerger(
    d_model: int = 1024,
    merge_ratio: float = 0.5,
    merger_type: str = "simple",
    temperature: float = 1.0,
    **settings: Any,
) -> TokenMerger:
    """A `TokenMerger` of the documented architecture.

    Args:
        d_model: width of the vision features.
        merge_ratio: share of the tokens that stay, in (0, 1].
        merger_type: `simple`, or `question_aware`, which needs `question_size`.
        temperature: initial value of `merger.temperature`, > 0.
        settings: further fields of `TokenMergerConfig`; TypeError for other names.
    """
    _check(settings, TokenMergerConfig)
    settings = {"architecture": "documented"} | settings
    merger = TokenMerger(
        TokenMergerConfig(feature_size=d_model, merge_ratio=merge_ratio, merger_type=merger_type, **settings)
    )
    merger.temperature = temperature
    return merger


def LayerSpecificPruner(
    d_model: int = 4096,
    layer_indices: Sequence[int] = (10, 20, 31),
    d_internal: int = 512,
    num_heads: int = 4,
    temperature: float = 1.0,
    **settings: Any,
) -> LayerPruner:
    """A `LayerPruner` of the documented architecture: one head per layer, each token kept where its mask is above 0.5.

    Args:
        d_model: the language model's width.
        layer_indices: prune before these layers.
        d_internal, num_heads: shape of the heads.
        temperature: initial value of `pruner.temperature`, > 0.
        settings: further fields of `LayerPrunerConfig`; TypeError for other names.
    """
    _check(settings, LayerPrunerConfig)
    settings = {"architecture": "documented", "selection": "threshold"} | settings
    pruner = LayerPruner(
        LayerPrunerConfig(
            hidden_size=d_model, layers=list(layer_indices), internal_size=d_internal, num_attention_heads=num_heads,
            **settings,
        )
    )  # fmt: skip
    pruner.temperature = temperature
    return pruner
