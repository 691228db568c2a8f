"""Exact entropies of factorised binary codes without a table of N × 2^d probabilities.

The bits of a code are independent given the sample, so the entropy of one sample's code is a sum over bits. The mean
distribution over codes is no product, but it is a mean of products of two halves: with A `(n, 2^(d/2))` and B
`(n, 2^(d-d/2))` the probabilities of the lower and upper bits, mean = AᵀB / n. That table has 2^d entries, whatever n is.

Source of the loss: MAGVIT-v2 2310.05737. Nothing is approximated or clamped.
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
        across_ranks: the batch is that of all distributed ranks (of equal n). Its entropy then has the global value and
            a gradient that is right once averaged over ranks, as DDP does.

    Returns:
        mean over samples of the entropy of the code, and the entropy of the mean distribution over 2^d codes.

    Raises:
        ValueError: logits are not a table of at least one sample and one bit.
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
        everyone = all_reduce(mean.detach().clone()) / world_size()
        mean = mean + (everyone - mean).detach()
    # p · log p of a code of probability 0 is 0, and so is its share of the gradient; log of the smallest number is finite.
    return per_sample, -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
