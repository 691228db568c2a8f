"""What `TokenMerger` returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class TokenMergerOutput(ModelOutput):
    """Result of `TokenMerger`.

    Attributes:
        merged_features: `(batch, m, d)`.
        merge_weights: `(batch, n, m)`, columns sum to 1.
        keep_index: `(batch, m)`, sorted places of the centres among the n tokens.
        keep_mask: bool `(batch, m)`, False on slots beyond a row's own m (question-dependent ratio only).
        scores: `(batch, n)` importance.
        kept_tokens: `(batch,)` expected number of kept tokens, differentiable: the sum of sigmoid(scores), or what the
            question-dependent ratio gives.
        sparsity_loss: (kept_tokens - m)², mean over the batch: the documented sparsity loss. With `max_ratio`, (mean of
            kept_tokens - budget)²: rows may differ, their mean is held.
        entropy_loss: mean entropy (nats) of the assignment of a token to centres, plus the predicted share kept.
    """

    merged_features: torch.Tensor | None = None
    merge_weights: torch.Tensor | None = None
    keep_index: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    kept_tokens: torch.Tensor | None = None
    sparsity_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
