"""What `TokenMerger` returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class TokenMergerOutput(ModelOutput):
    """Result of `TokenMerger`.

    Attributes:
        merged_features: `(batch, m, d)`.
        merge_weights: `(batch, n, m)`; columns sum to 1, in the documented architecture rows do.
        keep_index: `(batch, m)`, places of the centres among the n tokens, ascending.
        keep_mask: bool `(batch, m)`; False on slots that a row does not use, because its own number of tokens is smaller.
        scores: `(batch, n)`, importance of each token.
        kept_tokens: `(batch,)` expected number of kept tokens, differentiable: the sum of sigmoid(scores), or the number
            that the question-dependent ratio gives.
        sparsity_loss: the documented (kept_tokens − m)², mean over the batch. With `max_ratio` it is (mean of kept_tokens −
            budget)², which holds the mean and lets rows differ.
        entropy_loss: mean entropy (nats) of a token's assignment to centres; plus the mean predicted share, if there is one
            and no `max_ratio`.
    """

    merged_features: torch.Tensor | None = None
    merge_weights: torch.Tensor | None = None
    keep_index: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    kept_tokens: torch.Tensor | None = None
    sparsity_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
