"""Losses and schedules of token pruning: tensors in, scalars out."""

from collections.abc import Sequence

import torch


def annealed_temperature(progress: float, start: float, end: float, rate: float) -> float:
    """The temperature at `progress` in [0, 1]: linear from `start` to `end` over the first share `rate` of training."""
    share = 1.0 if rate <= 0 else min(1.0, progress / rate)
    return start + (end - start) * share


def answer_kl(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) in nats over the positions that predict a label.

    Args:
        teacher, student: logits `(batch, length, vocab)`.
        labels: `(batch, length)`, -100 where nothing is predicted.
    """
    predicts = labels[:, 1:] != -100
    p = teacher[:, :-1][predicts].float().log_softmax(-1)
    q = student[:, :-1][predicts].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def keep_rate_loss(keep_rates: Sequence[torch.Tensor]) -> torch.Tensor:
    """max(0, rate)², mean over rows and layers; a rate `(batch,)` is the soft share of kept tokens minus the budget's."""
    return torch.stack([rate.clamp(min=0).square().mean() for rate in keep_rates]).mean()


def binarization_loss(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of mask · (1 − mask) over tokens with a mask below 1, then over rows and layers; 0 for binary masks."""
    per_row = [(mask * (1.0 - mask)).sum(-1) / (mask < 1).sum(-1).clamp(min=1) for mask in masks]
    return torch.stack([values.mean() for values in per_row]).mean()


def mask_statistics(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean, standard deviation, minimum and maximum of a soft mask."""
    mask = mask.detach().float()
    return {"mean": mask.mean(), "std": mask.std(), "min": mask.min(), "max": mask.max()}
