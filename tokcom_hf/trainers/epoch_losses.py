"""Losses and learning rate by epoch, under the name of the stage, for the trackers."""

from typing import Any

import torch
from transformers import TrainerCallback


class EpochLossCallback(TrainerCallback):
    """Logs `STAGE/train_loss` and `STAGE/learning_rate` after each epoch, `STAGE/val_loss` and `STAGE/best_val_loss` after
    each evaluation during training.

    The training loss is the mean over the epoch's batches; if a run resumes within an epoch, over the batches since then.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._total: torch.Tensor | None = None
        self._count = 0
        self._best: float | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one batch, a scalar."""
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def on_train_begin(self, args, state, control, **kwargs):
        self._total, self._count = None, 0
        # A resumed run knows the evaluations before it.
        losses = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
        self._best = min(losses, default=None)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._total is None:
            return
        mean = self.trainer.accelerator.reduce(self._total / self._count, "mean").item()
        self._total, self._count = None, 0
        self._log({"train_loss": mean, "learning_rate": self.trainer._get_learning_rate()})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = (metrics or {}).get("eval_loss")
        if loss is None or not self.trainer.is_in_train:
            return
        self._best = loss if self._best is None else min(loss, self._best)
        self._log({"val_loss": loss, "best_val_loss": self._best})

    def _log(self, values: dict[str, float]) -> None:
        self.trainer.log({f"{self.trainer.stage}/{name}": value for name, value in values.items()})
