"""Keeps a resumed run's own hyperparameters, which the checkpoint's optimizer would replace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import ExportableState


@contextmanager
def own_settings(optimizer: Any, scheduler: Any = None) -> Iterator[None]:
    """Within this context, loading a state changes moments and step counts only, not learning rates, betas and decay.

    A checkpoint holds both, so loading it would silently undo a new `learning_rate`. If no setting was changed, nothing is
    written.

    Args:
        optimizer: an optimizer, with the settings of this run in its `param_groups`.
        scheduler: the scheduler of the optimizer, with `base_lrs`; or None.
    """
    built = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = list(getattr(scheduler, "base_lrs", ()))
    yield
    for group, own in zip(optimizer.param_groups, built):
        before, now = group.get("initial_lr"), own.get("initial_lr")
        if before is not None and now is not None and before != now:
            # The rate at this point of the schedule, in proportion to the new learning rate.
            group["lr"] = group["lr"] * now / before if before else now
            group["initial_lr"] = now
        for name, value in own.items():
            if name not in ("lr", "initial_lr") and group.get(name) != value:
                group[name] = value
    if rates and rates != scheduler.base_lrs:
        scheduler.base_lrs = rates
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def join_resumed_state(trainer: Any) -> None:
    """Gives a resumed trainer state this run's callbacks, and this run's steps of logging, saving and evaluation."""
    # The state knows only the callbacks with which it was saved; Trainer updates those of this run.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
    # Trainer would keep the steps of the checkpoint.
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
