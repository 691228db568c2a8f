"""Exact entropies of binary codes with independent bits, without a table of n × 2^d probabilities (MAGVIT-v2 2310.05737).

The entropy of one sample's code is the sum of the entropies of its bits. The mean distribution over codes is no product, but
a mean of products of two halves: mean = AᵀB / n, where A `(n, 2^(d/2))` and B `(n, 2^(d−d/2))` are the probabilities of the
patterns of the lower and of the upper bits. This table has 2^d entries for any n. Nothing is approximated.
"""

import torch
import torch.nn.functional as F

from .vqgan_code_search import all_reduce, world_size


def _half(log_on: torch.Tensor, log_off: torch.Tensor) -> torch.Tensor:
    """Log probability `(n, 2^m)` of every pattern of m bits, bit 0 least significant."""
    patterns = torch.zeros(log_on.shape[0], 1, device=log_on.device, dtype=log_on.dtype)
    for bit in range(log_on.shape[1]):
        patterns = torch.cat([patterns + log_off[:, bit : bit + 1], patterns + log_on[:, bit : bit + 1]], dim=1)
    return patterns


def factorised_entropy(logits: torch.Tensor, across_ranks: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample and batch entropy in nats of codes whose bits are independent given the sample.

    Args:
        logits: `(n, d)`; bit i of a sample is 1 with probability sigmoid(logits_i). Computed in float64 where they are
            float64, else in float32.
        across_ranks: the batch consists of those of all ranks (of equal n). The batch entropy then has its global value, and
            its gradient is right once gradients are averaged over ranks, as DDP does.

    Returns:
        E[H(code | sample)] and H(E[p(code | sample)]) over 2^d codes, scalars.

    Raises:
        ValueError: `logits` are not two-dimensional, or empty.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"Entropies need logits of shape (samples, bits), got {tuple(logits.shape)}.")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_on, log_off = F.logsigmoid(logits), F.logsigmoid(-logits)
    per_sample = -(log_on.exp() * log_on + log_off.exp() * log_off).sum(1).mean()
    middle = logits.shape[1] // 2
    low, high = _half(log_on[:, :middle], log_off[:, :middle]), _half(log_on[:, middle:], log_off[:, middle:])
    mean = low.exp().t() @ high.exp() / logits.shape[0]
    if across_ranks and world_size() > 1:
        global_mean = all_reduce(mean.detach().clone()) / world_size()
        mean = mean + (global_mean - mean).detach()
    # The clamp makes the term and the gradient of a code of probability 0 zero instead of NaN.
    return per_sample, -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
