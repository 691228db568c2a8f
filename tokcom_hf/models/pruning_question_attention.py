"""Attention between vision and question tokens, in both directions, for `TokenMerger` and `LayerPruner`."""

import torch
import torch.nn.functional as F
from torch import nn

from .shared_layers import eager_attention


class QuestionAttention(nn.Module):
    """Multi-head attention of tokens `(batch, n, size)` to a question `(batch, q, size)`; zero in rows without a question.

    Args:
        config: with `internal_size` and `num_attention_heads`. Attention is torch's fused function; with
            `_attn_implementation="eager"` it is computed step by step.
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


class QuestionGuide(nn.Module):
    """Attention that each vision token `(batch, n, token_size)` receives from the question's tokens `(batch, q, size)`.

    Args:
        config: with `internal_size` and `num_attention_heads`.
        token_size: width of the vision tokens; the question has width `internal_size`.
    """

    def __init__(self, config, token_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.internal_size, config.internal_size)
        self.key = nn.Linear(token_size, config.internal_size)

    def forward(
        self, tokens: torch.Tensor, question: torch.Tensor, question_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Shares `(batch, n)` that sum to 1, means over heads and question tokens; uniform in rows without a question."""
        split = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        query, keys = split(self.query(question)), split(self.key(tokens))
        attention = (query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5).float().softmax(-1).mean(1)
        if question_mask is None:
            return attention.mean(1)
        weight = question_mask[..., None].to(attention.dtype)
        mean = (attention * weight).sum(1) / weight.sum(1).clamp(min=1)
        empty = ~question_mask.bool().any(-1, keepdim=True)
        return torch.where(empty, torch.full_like(mean, 1.0 / mean.shape[-1]), mean)
