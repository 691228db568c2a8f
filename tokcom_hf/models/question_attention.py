"""Vision tokens attend to question tokens: the block that `TokenMerger` and `LayerPruner` share."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class QuestionAttention(nn.Module):
    """Multi-head cross-attention `(batch, n, size)` to `(batch, q, size)`; zero where a row has no question."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
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
        mixed = scaled_dot_product_attention(split(self.query(tokens)), split(keys), split(values), attn_mask=allowed)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        return mixed.masked_fill(empty[:, None, None], 0.0)
