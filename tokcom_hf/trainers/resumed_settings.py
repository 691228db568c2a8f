"""A resumed run trains with its own hyperparameters, not with those in the checkpoint's optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import ExportableState


@contextmanager
def own_settings(optimizer: Any, scheduler: Any = None) -> Iterator[None]:
    """States loaded inside bring moments and step counts; learning rates, betas and decay stay as they were built.

    A checkpoint holds both, and loading it alone would silently undo another `learning_rate`. Where nothing was changed
    nothing is written.

    Args:
        optimizer: with `param_groups`.
        scheduler: with `base_lrs`, or None.
    """
    built = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = list(getattr(scheduler, "base_lrs", ()))
    yield
    for group, own in zip(optimizer.param_groups, built):
        before, now = group.get("initial_lr"), own.get("initial_lr")
        if before is not None and now is not None and before != now:
            # Where the schedule stands, on the new scale.
            group["lr"] = group["lr"] * now / before if before else now
            group["initial_lr"] = now
        for name, value in own.items():
            if name not in ("lr", "initial_lr") and group.get(name) != value:
                group[name] = value
    if rates and rates != scheduler.base_lrs:
        scheduler.base_lrs = rates
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def join_resumed_state(trainer: Any) -> None:
    """Makes the state of a resumed run this one's: its callbacks, and how often it logs, saves and evaluates."""
    # The state knows only the callbacks it was saved with; Trainer updates those of this run.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
    # Trainer would keep to the checkpoint's steps.
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
