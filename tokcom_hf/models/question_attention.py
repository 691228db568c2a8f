"""Vision tokens attend to question tokens: the block that `TokenMerger` and `LayerPruner` share."""

import torch
import torch.nn.functional as F
from torch import nn

from .layers import eager_attention


class QuestionAttention(nn.Module):
    """Multi-head cross-attention `(batch, n, size)` to `(batch, q, size)`; zero where a row has no question.

    config: with `internal_size` and `num_attention_heads`; torch's fused attention, unless it asks for `eager`.
    """

    def __init__(self, config):
        super().__init__()
        size = config.internal_size
        self.config = config
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, size)

    def forward(
        self, tokens: torch.Tensor, question: torch.Tensor, question_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        split = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        keys, values = self.key_value(question).chunk(2, dim=-1)
        if question_mask is None:
            question_mask = torch.ones(question.shape[:2], device=question.device)
        question_mask = question_mask.bool()
        empty = ~question_mask.any(-1)
        allowed = (question_mask | empty[:, None])[:, None, None, :]
        query, keys, values = split(self.query(tokens)), split(keys), split(values)
        if self.config._attn_implementation == "eager":
            mixed, _ = eager_attention(self, query, keys, values, allowed, scaling=query.shape[-1] ** -0.5)
        else:
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed).transpose(1, 2)
        mixed = self.output(mixed.flatten(2))
        return mixed.masked_fill(empty[:, None, None], 0.0)
