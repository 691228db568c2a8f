"""The loss on held-out rows, for trainers whose `evaluate` measures other things by default."""

from typing import Any

from transformers import Trainer


def loss_and_predictions(trainer: Any, rows: Any, ignore_keys: list[str] | None, prefix: str) -> dict[str, float]:
    """The held-out loss and the user's metrics; empty if `compute_metrics` is None and the best model needs no loss.

    `metric_for_best_model` is the loss by default.

    Args:
        trainer: a `CompressionTrainer`.
        rows: data set; None: the trainer's.
        ignore_keys: keys of the model's output that predictions leave out.
        prefix: prefix of the names of the metrics.
    """
    best = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    if trainer.compute_metrics is None and best != "loss":
        return {}
    loader, loss_only = trainer.get_eval_dataloader(rows), trainer.compute_metrics is None
    return Trainer.evaluation_loop(trainer, loader, "Evaluation", loss_only, ignore_keys, prefix).metrics or {}
