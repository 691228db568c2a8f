"""The new rows of a vocabulary, apart from the old tables, and where a base model keeps those."""

import torch
from torch import nn
from torch.nn import functional as F


class _TiedLookup(torch.autograd.Function):
    """Embedding lookup that adds its gradient to the one the loss left of the same table: one dense tensor, not two."""

    @staticmethod
    def forward(ctx, weight, index, handover):
        ctx.save_for_backward(index)
        ctx.handover, ctx.shape = handover, weight.shape
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, grad_output):
        (index,) = ctx.saved_tensors
        total = ctx.handover.pop("grad", None)
        if total is None:
            total = grad_output.new_zeros(ctx.shape)
        return total.index_add_(0, index.flatten(), grad_output.flatten(0, -2).to(total.dtype)), None, None


class LFQRows(nn.Module):
    """Embedding, head and bias rows of 2^output_dim new tokens.

    Parameters: `embedding` (rows, hidden); `head` (rows, hidden), absent where the base model ties its tables: then
    `embedding` serves both sides; `bias` (rows,) where the base model's head has one.
    """

    def __init__(self, rows: int, hidden_size: int, tied: bool, bias: bool):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(rows, hidden_size))
        self.head = None if tied else nn.Parameter(torch.zeros(rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Head weight and bias of the new rows."""
        return (self.embedding if self.head is None else self.head), self.bias

    def forward(self, index: torch.LongTensor, handover: dict | None = None) -> torch.Tensor:
        """Embeddings `(..., hidden)` of row numbers; `handover`: see `split_cross_entropy`."""
        if handover is None:
            return F.embedding(index, self.embedding)
        return _TiedLookup.apply(self.embedding, index, handover)


def text_host(base: nn.Module) -> nn.Module:
    """The module that owns the vocabulary: the model itself, or `language_model` in remote code with an `llm_config`."""
    if hasattr(base.config, "llm_config") and hasattr(base, "language_model"):
        return base.language_model
    return base


def vocabulary_of(base: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    """Input embedding and output head of a base model.

    Raises:
        ValueError: there is no head, or the two do not agree on the number of rows.
        TypeError: not an ordinary embedding and linear layer.
    """
    host, name = text_host(base), type(base).__name__
    head = host.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{name} has no output embeddings, so it cannot predict LFQ tokens. Load it with AutoModelForCausalLM or "
            "AutoModelForImageTextToText."
        )
    embedding = host.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or not hasattr(head, "weight"):
        raise TypeError(
            f"{name} keeps its vocabulary in {type(embedding).__name__} and {type(head).__name__}; an nn.Embedding and "
            "an nn.Linear are needed (quantised vocabulary tables are not supported)."
        )
    if head.weight.shape != embedding.weight.shape:
        raise ValueError(
            f"The embedding of {name} has shape {tuple(embedding.weight.shape)} and its head "
            f"{tuple(head.weight.shape)}: with different shapes one id would mean two things."
        )
    return embedding, head


@torch.no_grad()
def initialize_rows(rows: torch.Tensor, old: torch.Tensor, method: str, std: float, output_dim: int) -> None:
    """Fills new rows `(2^output_dim, hidden)` in place.

    `mean`: mean of the old rows plus Σ_i ±w_i over the bits of the row number, w_i normal with variance std² / bits,
    so offsets have standard deviation `std` and codes that share bits start close to each other.
    """
    if method == "zeros":
        rows.zero_()
    elif method == "random":
        rows.normal_(0.0, std)
    else:
        offsets = torch.randn(output_dim, rows.shape[1], device=rows.device) * std / output_dim**0.5
        number = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        signs = (number.bitwise_right_shift(torch.arange(output_dim, device=rows.device)) & 1).float() * 2 - 1
        rows.copy_(old.float().mean(0) + signs @ offsets)
