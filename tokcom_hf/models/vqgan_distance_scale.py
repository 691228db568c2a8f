"""The scale in softmax(−distance² / (temperature · scale)), the soft assignment of a vector to codes."""

import math

import torch

from .vqgan_code_search import all_reduce, world_size


@torch.no_grad()
def distance_scale(kind: str, vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The number by which squared distances are divided, so that a temperature means the same at any width.

    It has no gradient: otherwise features could shrink to nothing to make distances small.

    Args:
        kind: `dim` (√width), `mean` (mean squared distance between vectors and codes), `variance` (mean variance of a
            channel of the vectors) or `none` (1).
        vectors: `(n, width)`.
        codebook: `(k, width)`.
    """
    if kind == "none":
        return torch.ones((), device=vectors.device)
    if kind == "dim":
        return torch.tensor(math.sqrt(vectors.shape[1]), device=vectors.device)
    if kind == "variance":
        return (vectors - vectors.mean(0)).square().mean().clamp_min(1e-12)
    squares = vectors.square().sum(1).mean() + codebook.square().sum(1).mean()
    return (squares - 2 * (vectors.mean(0) * codebook.mean(0)).sum()).clamp_min(1e-12)


@torch.no_grad()
def step_scale(kind: str, micro_batches: list[torch.Tensor], codebook: torch.Tensor) -> torch.Tensor:
    """`distance_scale` over all micro-batches of an optimizer step and all ranks; every rank must call it."""
    if kind in ("none", "dim"):
        return distance_scale(kind, micro_batches[0], codebook)
    if kind == "variance":
        moments = [torch.stack([vectors.mean(0), vectors.square().mean(0)]) for vectors in micro_batches]
        first, second = all_reduce(torch.stack(moments).mean(0)) / world_size()
        return (second - first.square()).mean().clamp_min(1e-12)
    scales = torch.stack([distance_scale(kind, vectors, codebook) for vectors in micro_batches])
    return all_reduce(scales.mean()) / world_size()
