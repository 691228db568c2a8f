"""Ends a run whose loss, gradients, weights or optimizer states hold NaN or infinity, before they are saved."""

import math
from typing import Any

from torch import nn

from ..checkpoints import last_finite_checkpoint
from .checkpoint_writing import first_of_all_ranks
from .finite import nonfinite_names, nonfinite_state


class FiniteGuard:
    """Checks a trainer's gradient norm, weights and optimizer states, and makes the error that ends the run.

    Attributes:
        grad_norm: gradient norm of the last optimizer step; 0 before the first.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.grad_norm = 0.0

    def error(self, what: str, step: int | None = None) -> FloatingPointError:
        """The error to raise; it names the last checkpoint that is whole and finite.

        Args:
            what: what became NaN or infinite, as the beginning of a sentence.
            step: optimizer step at which this happened; None: the step that is being taken.
        """
        trainer = self.trainer
        step = trainer.state.global_step + 1 if step is None else step
        last = last_finite_checkpoint(trainer.args.output_dir, trainer.checkpoint_files())
        advice = f"the last verified checkpoint is {last}" if last else "no checkpoint had been saved yet"
        again = "resume from it" if last else "start again"
        return FloatingPointError(
            f"{what} at step {step}; {advice}. Lower the learning rate or set max_grad_norm, then {again}."
        )

    def see_grad_norm(self, norm: Any) -> None:
        """Stores a step's gradient norm; raises if it is not finite, unless `stop_on_nonfinite_loss` is off."""
        # A loss scaler skips steps of infinite gradients by design.
        self.grad_norm = 0.0 if self.trainer.accelerator.scaler is not None else float(norm)
        if self.trainer.args.stop_on_nonfinite_loss:
            self.check_grad_norm()

    def check_grad_norm(self) -> None:
        """Raises `FloatingPointError` where the last gradient norm is NaN or infinite."""
        if not math.isfinite(self.grad_norm):
            raise self.error(f"The gradient norm became {self.grad_norm}")

    def check_weights(self, everywhere: bool) -> None:
        """Raises FloatingPointError if something holds NaN or infinity; see `CompressionTrainer.check_finite`."""
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
        # With DeepSpeed this would gather the whole state; DeepSpeed checks the gradients itself.
        parts["optimizer: "] = None if trainer.is_deepspeed_enabled else trainer.optimizer
        names = []
        for prefix, item in parts.items():
            if isinstance(item, nn.Module):
                names += [prefix + name for name in nonfinite_names(item)]
            elif item is not None:
                names += [prefix + name for name in nonfinite_state(item.state_dict())]
        return names
