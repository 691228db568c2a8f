"""Ends a run whose numbers left the finite ones, before they are saved."""

import math
from typing import Any

from torch import nn

from ..checkpoints import last_finite_checkpoint
from .checkpoint_writing import first_of_all_ranks
from .finite import nonfinite_names, nonfinite_state


class FiniteGuard:
    """Looks at a trainer's loss, gradient norm, weights and optimizer states.

    Attributes:
        grad_norm: of the last optimizer step, 0 before the first.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.grad_norm = 0.0

    def error(self, what: str, step: int | None = None) -> FloatingPointError:
        """The error to raise; it names the last checkpoint that is whole and finite.

        Args:
            what: has become not finite.
            step: at which it did; None is the one being taken.
        """
        trainer = self.trainer
        step = trainer.state.global_step + 1 if step is None else step
        last = last_finite_checkpoint(trainer.args.output_dir, trainer.checkpoint_files())
        advice = f"the last verified checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return FloatingPointError(
            f"{what} at step {step}; {advice}. Lower the learning rate or set max_grad_norm, then resume from it."
        )

    def see_grad_norm(self, norm: Any) -> None:
        """Notes a step's gradient norm and ends the run where it is not finite, unless the arguments let it train on."""
        # A loss scaler skips steps of infinite gradients by design.
        self.grad_norm = 0.0 if self.trainer.accelerator.scaler is not None else float(norm)
        if self.trainer.args.stop_on_nonfinite_loss:
            self.check_grad_norm()

    def check_grad_norm(self) -> None:
        """Raises `FloatingPointError` where the last gradient norm is NaN or infinite."""
        if not math.isfinite(self.grad_norm):
            raise self.error(f"The gradient norm became {self.grad_norm}")

    def check_weights(self, everywhere: bool) -> None:
        """Raises `FloatingPointError`, see `CompressionTrainer.check_finite`."""
        bad: str | None = None
        if names := self._nonfinite():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            bad = ", ".join(names[:3]) + more
        if everywhere:
            bad = first_of_all_ranks(bad)
        if bad is not None:
            raise self.error(
                f"Weights or optimizer states hold NaN or infinity ({bad})", self.trainer.state.global_step
            )

    def _nonfinite(self) -> list[str]:
        trainer = self.trainer
        parts: dict[str, Any] = {"": trainer.unwrapped_model, "average of ": trainer.average}
        parts |= {f"{name}: ": item for name, item in trainer.auxiliary_state().items()}
        # DeepSpeed would gather the whole state; it looks at the gradients itself.
        parts["optimizer: "] = None if trainer.is_deepspeed_enabled else trainer.optimizer
        names = []
        for prefix, item in parts.items():
            if isinstance(item, nn.Module):
                names += [prefix + name for name in nonfinite_names(item)]
            elif item is not None:
                names += [prefix + name for name in nonfinite_state(item.state_dict())]
        return names
