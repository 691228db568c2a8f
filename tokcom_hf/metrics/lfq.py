"""Statistics of the bits of a lookup-free quantizer (LFQ)."""

import torch

from .codebook import codebook_usage, utilization_ceiling

# A bit whose mean lies outside this range counts as dead.
ALIVE = (0.2, 0.8)


def code_indices(codes: torch.Tensor) -> torch.Tensor:
    """Converts codes `(..., d)`, whose values above 0 are ones, to int64 indices `(...)`; bit 0 is least significant."""
    places = torch.arange(codes.shape[-1], device=codes.device)
    return ((codes > 0).long() << places).sum(-1)


def bit_report(codes: torch.Tensor) -> dict:
    """Measures the mean, flip rate and pairwise correlation of bits, and the usage of the 2^d codes.

    Args:
        codes: `(images, n, d)`: n codes of d values per image; a value above 0 is a one.

    Returns:
        tokens: number of codes, N.
        bit_mean: share of ones of each bit; bit_mean_min and bit_mean_max are its extremes.
        flip_rate: per bit, the share of neighbours in reading order that differ in it (0.5 for coin flips).
        dead_bits: number of bits whose mean lies outside [0.2, 0.8].
        max_correlation, mean_correlation: maximum and mean absolute correlation of two different bits; a constant bit counts
            as uncorrelated.
        active, utilization, entropy, normalized_entropy, perplexity: usage of the 2^d codes, see `codebook_usage`.
        utilization_ceiling: expected utilization of N codes drawn uniformly, 1 − (1 − 1/K)^N with K = 2^d.

    Raises:
        ValueError: codes are not three-dimensional, or empty.
    """
    if codes.ndim != 3 or not codes.numel():
        raise ValueError(f"Codes must be (images, tokens, bits), got shape {tuple(codes.shape)}.")
    bits = (codes > 0).double()
    images, length, width = bits.shape
    flat = bits.flatten(0, 1)
    mean = flat.mean(0)
    flips = (bits[:, 1:] != bits[:, :-1]).double().mean((0, 1)) if length > 1 else torch.zeros_like(mean)
    centred = flat - mean
    norm = centred.square().sum(0).sqrt()
    correlation = (centred.t() @ centred / (norm[:, None] * norm).clamp_min(1e-12)).abs()
    others = correlation[~torch.eye(width, dtype=torch.bool, device=codes.device)]
    usage = codebook_usage(code_indices(codes), 1 << width)
    return {
        "tokens": images * length,
        "bit_mean": mean.tolist(),
        "bit_mean_min": float(mean.min()),
        "bit_mean_max": float(mean.max()),
        "flip_rate": flips.tolist(),
        "dead_bits": int(((mean < ALIVE[0]) | (mean > ALIVE[1])).sum()),
        "max_correlation": float(others.max()) if width > 1 else 0.0,
        "mean_correlation": float(others.mean()) if width > 1 else 0.0,
        **usage,
        "utilization_ceiling": utilization_ceiling(images * length, 1 << width),
    }
