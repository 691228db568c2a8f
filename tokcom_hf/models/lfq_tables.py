"""Old and new vocabulary rows as one table: views of the joined table, and the final merge."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .lfq_rows import text_host, vocabulary_of


class SplitTable(nn.Module):
    """A view of the embedding or of the head over old and new rows. It registers no parameters a second time."""

    # The model, its embedding or head, and whether the latter is the head.
    _view: tuple[Any, Any, bool]

    def __init__(self, model, table: nn.Module, head: bool):
        super().__init__()
        object.__setattr__(self, "_view", (model, table, head))

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        model, table, head = self._view
        return table.weight, model.lfq_rows.tables()[0] if head else model.lfq_rows.embedding

    @property
    def weight(self) -> torch.Tensor:
        """`(old + 2^output_dim, hidden)`, a copy of both tables, with their gradients in `.grad`.

        `.grad` is None before a backward, and zero in frozen rows.
        """
        old, new = self._tables()
        joined = join_tables(old, new)
        if old.grad is not None or new.grad is not None:
            joined.grad = join_tables(*(torch.zeros_like(t) if t.grad is None else t.grad for t in (old, new)))
        return joined

    @property
    def trainable_mask(self) -> torch.Tensor:
        """`(old + 2^output_dim,)` booleans: the rows that train."""
        return torch.cat([torch.full((len(t),), t.requires_grad) for t in self._tables()])

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the head over old and new ids, `(old + 2^output_dim,)`, a copy; None without one."""
        model, table, head = self._view
        return (
            join_tables(table.bias, model.lfq_rows.tables()[1])
            if head and getattr(table, "bias", None) is not None
            else None
        )

    @property
    def num_embeddings(self) -> int:
        """Number of rows, old and new."""
        return self._view[0].lfq_token_range[1]

    out_features = num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self._view[1].weight.shape[1]

    in_features = embedding_dim

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._view[1](inputs)


class JoinedHead(SplitTable):
    """The view of the head. It is a submodule of the model, because peft looks for the output embeddings among these."""


class OldHead(nn.Module):
    """The class that the base model's `nn.Linear` head gets in an `LFQExpandedModel`; it computes the same.

    LoRA on the head would change the logits of old ids only. As this class is no `nn.Linear`, `target_modules="all-linear"`
    leaves the head out, and peft refuses a head that is named.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)


def join_tables(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Old rows followed by new rows, detached, on the old rows' device and in their dtype."""
    return torch.cat([old.detach(), new.detach().to(old)])


def merge_rows(model) -> PreTrainedModel:
    """The base model of an `LFQExpandedModel`, of its own class, with old and new rows in one table.

    Its text configuration records `lfq_output_dim` and `lfq_start_token_id`, which `get_lfq_token_range` reads.

    Raises:
        ValueError: weights that are offloaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "Some weights are offloaded to CPU or disk and cannot be merged; load the model without device_map first."
        )
    embedding, head = vocabulary_of(model.base)
    weight, bias = model.lfq_rows.tables()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(join_tables(embedding.weight, model.lfq_rows.embedding))
    head.weight = embedding.weight if tied else nn.Parameter(join_tables(head.weight, weight))
    if bias is not None:
        head.bias = nn.Parameter(join_tables(head.bias, bias))
    if type(head) is OldHead:
        head.__class__ = nn.Linear
    embedding.num_embeddings = head.out_features = model.config.lfq_token_range[1]
    model.hooks.remove(embedding, head)
    text = model.base.config.get_text_config()
    text.vocab_size = model.config.lfq_token_range[1]
    text.lfq_output_dim, text.lfq_start_token_id = model.config.output_dim, model.config.lfq_start_token_id
    host = text_host(model.base)
    if hasattr(host, "vocab_size"):
        host.vocab_size = text.vocab_size
    return model.base
