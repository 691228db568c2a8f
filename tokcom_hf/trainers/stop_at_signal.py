"""Ends training at a signal with a checkpoint of the current step; an evaluation that was due is left to the resumed run."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..stopping import Stopped, agreed_signal, noted_signal, training_begins, training_is_over


class EvaluationCut(BaseException):
    """Raised to leave an evaluation during training, which the resumed run makes up."""


class StopAtSignal(TrainerCallback):
    """Ends training after the step in which a signal came: writes a checkpoint of the step and raises `Stopped`.

    Args:
        trainer: a `CompressionTrainer`, which adds this callback itself. With None (for a plain `Trainer`) an evaluation
            is neither cut short nor made up, and trackers are not closed.
    """

    def __init__(self, trainer: Any = None):
        self.trainer = trainer
        self._stopping: int | None = None
        self._saved: int | None = None  # step of the newest checkpoint
        self._states: tempfile.TemporaryDirectory | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._stopping, self._saved = None, None
        training_begins()

    def on_step_end(self, args, state, control, **kwargs):
        if not _ends_epoch(state, control):
            self._stop(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop(state, control)

    def _stop(self, state, control) -> None:
        number = agreed_signal()
        if number is not None:
            self.save_and_stop(number, state, control)

    def save_and_stop(self, number: int, state, control) -> None:
        """Asks Trainer for a checkpoint; its log records which signal ended the run and whether an evaluation is due."""
        self._stopping = number
        entry = {"stopped_by": signal.Signals(number).name, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry | {"evaluation_due": bool(control.should_evaluate)})
        control.should_evaluate, control.should_save = False, True

    def on_prediction_step(self, args, state, control, **kwargs):
        # Ranks take different numbers of evaluation steps, so several ranks could not agree here.
        if self.trainer is not None and noted_signal() is not None and args.world_size == 1:
            raise EvaluationCut

    def on_save(self, args, state, control, **kwargs):
        self._saved = state.global_step
        if self._stopping is None and not (args.eval_strategy == "epoch" and _ends_epoch(state, control)):
            # The signal came while this checkpoint was being written, and nothing else is due at its step.
            self._stopping = agreed_signal()
        if self._stopping is not None:
            if self.trainer is not None:
                self.trainer.callback_handler.on_train_end(args, state, control)
            self._leave(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self._stopping is None:
            # The signal came after the last step: the model of that step is complete, and what follows is not done.
            self._stopping = agreed_signal()
            if self._stopping is not None:
                if self.trainer is not None and self._saved != state.global_step:
                    # With save_strategy "no" nothing else has written this step.
                    self.trainer._save_checkpoint(self.trainer.model, trial=None)
                    self._saved = state.global_step
                self._leave(args, state)
        training_is_over()

    def _leave(self, args, state) -> None:
        assert self._stopping is not None
        training_is_over()
        saved = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        raise Stopped(self._stopping, state.global_step, saved if self._saved == state.global_step else None)

    # ------------------------------------------------------------------ evaluations
    def evaluate_or_stop(self, proceed: Callable[[], Any]) -> None:
        """Runs `proceed`, Trainer's log, evaluation and save of a step; a signal during the evaluation cuts it and saves.

        The checkpoint then holds the random states from before the evaluation.
        """
        trainer = self.trainer
        if not trainer.control.should_evaluate:
            proceed()
            return
        with tempfile.TemporaryDirectory() as states:
            trainer._save_rng_state(states)
            try:
                proceed()
                return
            except EvaluationCut:
                trainer._load_rng_state(states)
        number = noted_signal()
        assert number is not None
        self.save_and_stop(number, trainer.state, trainer.control)
        proceed()

    def make_up_evaluation(self, checkpoint: str) -> None:
        """Runs the evaluation that a signal left to the run that resumes from `checkpoint`, if one is due."""
        trainer, self._states = self.trainer, None
        due = next((entry for entry in reversed(trainer.state.log_history) if entry.get("evaluation_due")), None)
        if due is None:
            return
        due["evaluation_due"] = False
        trainer._load_rng_state(checkpoint)
        control = trainer.control
        control.should_evaluate, control.should_log, control.should_save = True, False, False
        step = (trainer._tr_loss, None, trainer.model_wrapped, None, trainer.state.epoch, None, time.time())
        trainer._maybe_log_save_evaluate(*step)
        control.should_evaluate = control.should_save = False
        if trainer.state.best_global_step == trainer.state.global_step:
            # Trainer names the best checkpoint when it saves one, and that of this step is saved already.
            trainer.state.best_model_checkpoint = checkpoint
            trainer.best_model.on_save(trainer.args, trainer.state, control)
        self._states = tempfile.TemporaryDirectory()
        trainer._save_rng_state(self._states.name)

    def random_states(self, checkpoint: str | None) -> str | None:
        """The folder whose random states training continues with: `checkpoint`, or once that of the made-up evaluation."""
        states, self._states = self._states, None
        if states is None:
            return checkpoint
        self._kept = states  # keeps the folder until Trainer has read it
        return states.name


def _ends_epoch(state, control) -> bool:
    """Whether Trainer calls `on_epoch_end` next, which may ask for an evaluation and a checkpoint of the same step."""
    return control.should_training_stop or float(state.epoch or 0).is_integer()
