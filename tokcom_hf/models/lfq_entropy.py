"""Exact entropies of factorised binary codes without a table of N × 2^d probabilities."""

import torch
import torch.nn.functional as F


def _half(log_on: torch.Tensor, log_off: torch.Tensor) -> torch.Tensor:
    """Log probability `(n, 2^m)` of every pattern of m bits, bit 0 least significant."""
    patterns = torch.zeros(log_on.shape[0], 1, device=log_on.device, dtype=log_on.dtype)
    for bit in range(log_on.shape[1]):
        patterns = torch.cat([patterns + log_off[:, bit : bit + 1], patterns + log_on[:, bit : bit + 1]], dim=1)
    return patterns


def factorised_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample and batch entropy in nats of codes whose bits are independent given the sample.

    Args:
        logits: `(n, d)`; bit i of a sample is 1 with probability sigmoid(logits_i).

    Returns:
        mean over samples of the entropy of the code, and the entropy of the mean distribution over 2^d codes. The
        latter is exact: the mean of a product of halves is AᵀB / n, a 2^(d/2) × 2^(d/2) table.
    """
    logits = logits.float()
    log_on, log_off = F.logsigmoid(logits), F.logsigmoid(-logits)
    per_sample = -(log_on.exp() * log_on + log_off.exp() * log_off).sum(1).mean()
    middle = logits.shape[1] // 2
    low, high = _half(log_on[:, :middle], log_off[:, :middle]), _half(log_on[:, middle:], log_off[:, middle:])
    mean = low.exp().t() @ high.exp() / logits.shape[0]
    return per_sample, torch.special.entr(mean).sum()
