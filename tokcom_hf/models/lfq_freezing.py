"""Which parts of an `LFQExpandedModel` train: the base model, its vocabulary tables, the new rows.

Freezing also drops existing gradients: an optimizer skips a parameter without a gradient, and so applies neither momentum
nor weight decay to it.
"""

from collections.abc import Iterable

from torch import nn

from .lfq_rows import vocabulary_of


def freeze(parameters: Iterable[nn.Parameter], frozen: bool) -> None:
    """Freezes parameters, or unfreezes them where `frozen` is False."""
    for parameter in parameters:
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None


def freeze_tables(base: nn.Module, frozen: bool) -> None:
    """Freezes the vocabulary tables of a base model, or unfreezes them where `frozen` is False."""
    for module in vocabulary_of(base):
        freeze(module.parameters(recurse=False), frozen)


def trainable_rows(model) -> dict[str, float]:
    """How many vocabulary rows of an `LFQExpandedModel` train: `trainable`, `total` and `share` (0 to 1)."""
    old, end = model.config.lfq_token_range
    new = end - old if model.lfq_rows.embedding.requires_grad else 0
    trainable = new + (old if vocabulary_of(model.base)[0].weight.requires_grad else 0)
    return {"trainable": trainable, "total": end, "share": trainable / end}
