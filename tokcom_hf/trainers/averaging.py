"""Exponential moving averages of a model's weights in training: updating, using, saving and loading them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from ..checkpoints import AVERAGE_FILE


def averaged_model(model: nn.Module, decay: float, warmup: bool) -> AveragedModel:
    """A copy of `model` in which average ← decay · average + (1 − decay) · parameter at each update.

    Buffers (codebooks, latent statistics) are copied from the model, not averaged.

    Args:
        model: the model without its wrappers.
        decay: in (0, 1).
        warmup: replace `decay` by min(decay, (1 + n) / (10 + n)) after n updates.
    """
    update = _warmed_up(decay) if warmup else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, multi_avg_fn=update, use_buffers=False)
    average.requires_grad_(False)
    return average


def _warmed_up(decay: float) -> Callable:
    """EMA whose decay is min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's moving averages."""

    @torch.no_grad()
    def update(averaged, current, num_averaged) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    return update


@contextmanager
def averaged_weights(model: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """Within this context `model` holds the averaged parameters and `average` the model's; nothing if `average` is None."""
    if average is None:
        yield
        return
    _swap(model, average)
    try:
        yield
    finally:
        _swap(model, average)


def _swap(model: nn.Module, average: AveragedModel) -> None:
    for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        parameter.data, averaged.data = averaged.data, parameter.data


@torch.no_grad()
def copy_average(model: nn.Module, average: AveragedModel) -> None:
    """Copies the averaged parameters into the model."""
    for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        parameter.data.copy_(averaged.data)


def save_average(average: AveragedModel | None, folder: str | Path) -> None:
    """Writes the averaged weights into the checkpoint `folder`; nothing if `average` is None."""
    if average is not None:
        save_model(average, str(Path(folder) / AVERAGE_FILE))


def load_average(average: AveragedModel | None, folder: str | Path) -> None:
    """Reads the averaged weights of the checkpoint `folder`; nothing if `average` is None."""
    if average is not None:
        load_model(average, Path(folder) / AVERAGE_FILE)


class AverageCallback(TrainerCallback):
    """Starts a trainer's averaged weights and second networks, and updates the average after each optimizer step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start_auxiliary()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.unwrapped_model)
