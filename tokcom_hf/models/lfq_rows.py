"""`LFQRows`, the new rows of a vocabulary, and access to the old tables in a base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class GradientSink:
    """Receives the loss's gradient of tied rows from `split_cross_entropy`.

    The dictionary is wrapped in an object, because accelerate's hooks copy dictionaries among a module's arguments.
    """

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}


class _TiedLookup(torch.autograd.Function):
    """Embedding lookup whose backward adds to the loss's gradient of the same table: one dense tensor instead of two."""

    @staticmethod
    def forward(ctx, weight, index, sink):
        ctx.save_for_backward(index)
        ctx.sink, ctx.shape = sink, weight.shape
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, grad_output):
        (index,) = ctx.saved_tensors
        total = ctx.sink.pop("grad", None)
        if total is None:
            total = grad_output.new_zeros(ctx.shape)
        return total.index_add_(0, index.flatten(), grad_output.flatten(0, -2).to(total.dtype)), None, None


class LFQRows(nn.Module):
    """Embedding, head and bias rows of 2^output_dim new tokens.

    Parameters: `embedding` (rows, hidden); `head` (rows, hidden), or None where the base model ties its tables and
    `embedding` is both; `bias` (rows,) where the base model's head has one.
    """

    def __init__(self, rows: int, hidden_size: int, tied: bool, bias: bool):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(rows, hidden_size))
        self.head = None if tied else nn.Parameter(torch.zeros(rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Head weight and bias of the new rows."""
        return (self.embedding if self.head is None else self.head), self.bias

    def forward(
        self, inputs: torch.Tensor, gradient_sink: GradientSink | None = None, as_head: bool = False
    ) -> torch.Tensor:
        """Embeddings `(..., hidden)` of row numbers, or logits `(..., rows)` of hidden states.

        Args:
            inputs: int64 row numbers `(...)`; with `as_head` hidden states `(..., hidden)`, whose dtype the logits get.
            gradient_sink: where the loss leaves its gradient of tied rows in training; None without a loss.
            as_head: compute logits instead of embeddings.
        """
        if as_head:
            weight, bias = self.tables()
            return F.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))
        if gradient_sink is None:
            return F.embedding(inputs, self.embedding)
        return _TiedLookup.apply(self.embedding, inputs, gradient_sink.gradients)


def text_host(base: nn.Module) -> nn.Module:
    """The module with the vocabulary: the model itself, or its `language_model` in remote code with an `llm_config`."""
    inner: Any = getattr(base, "language_model", None)
    if hasattr(base.config, "llm_config") and inner is not None:
        return inner
    return base


def vocabulary_of(base: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    """Input embedding and output head of a base model.

    Raises:
        ValueError: the model has no head, or embedding and head have different shapes.
        TypeError: the embedding is no nn.Embedding, or the head has no weight.
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


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a `weight` computes, even if the weight is offloaded."""
    weight: Any = module.weight
    hook: Any = getattr(module, "_hf_hook", None)
    return weight.device if hook is None or not weight.is_meta else torch.device(hook.execution_device)


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[nn.Module]:
    """Within this context a module's weights are in memory, offloaded ones included."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)


@torch.no_grad()
def initialize_rows(rows: torch.Tensor, old: torch.Tensor, method: str, std: float, output_dim: int) -> None:
    """Fills new rows `(2^output_dim, hidden)` in place.

    `mean` gives the mean of the old rows plus Σ_i ±w_i over the bits of the row number, with w_i ~ N(0, std² / bits). The
    offsets have standard deviation `std`, and codes that share bits start close to each other.
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


def new_rows(base: nn.Module, config) -> LFQRows:
    """Rows for the LFQ tokens of an `LFQExpandedConfig`, tied and with a bias as the base model's tables are.

    Raises:
        ValueError: the base model has another number of rows than the configuration says.
    """
    embedding, head = vocabulary_of(base)
    old_rows, hidden_size = embedding.weight.shape
    if old_rows != config.lfq_start_token_id:
        raise ValueError(
            f"lfq_start_token_id={config.lfq_start_token_id}, but the base model's vocabulary table has {old_rows} "
            "rows: these LFQ tokens belong to another base model."
        )
    tied = head.weight is embedding.weight or bool(getattr(text_host(base).config, "tie_word_embeddings", False))
    return LFQRows(2**config.output_dim, hidden_size, tied=tied, bias=getattr(head, "bias", None) is not None)


@torch.no_grad()
def draw_rows(rows: LFQRows, base: nn.Module, config) -> None:
    """Fills all new rows and their bias by the method of an `LFQExpandedConfig`, from the old rows of `base`."""
    embedding, head = vocabulary_of(base)
    for new, old in ((rows.embedding, embedding), (rows.head, head)):
        if new is not None:
            with weights_at_hand(old):
                method, std = config.embedding_init_method, config.embedding_init_std
                initialize_rows(new, old.weight, method, std, config.output_dim)
    if rows.bias is not None:
        # The mean bias neither favours nor suppresses new ids.
        with weights_at_hand(head):
            rows.bias.fill_(float(head.bias.float().mean()))
