"""The loss on held-out rows, for trainers that have an evaluation of their own beside it."""

from typing import Any

from transformers import Trainer


def loss_and_predictions(trainer: Any, rows: Any, ignore_keys: list[str] | None, prefix: str) -> dict[str, float]:
    """The held-out loss and the user's metrics, where somebody asks for them.

    `compute_metrics` does, and `metric_for_best_model`, which is the loss by default.

    Args:
        trainer: a `CompressionTrainer`.
        rows: data set, None for the trainer's.
        ignore_keys: of the model's output, what predictions leave out.
        prefix: of the metrics' names.
    """
    best = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    if trainer.compute_metrics is None and best != "loss":
        return {}
    loader, loss_only = trainer.get_eval_dataloader(rows), trainer.compute_metrics is None
    return Trainer.evaluation_loop(trainer, loader, "Evaluation", loss_only, ignore_keys, prefix).metrics or {}
