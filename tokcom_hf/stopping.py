"""SIGTERM, SIGINT and a launcher that is gone: training ends with a checkpoint of its step, and exits as unfinished.

    with stop_on_signals():     # `run_recipe` does this
        trainer.train(...)      # CompressionTrainer has the callback; a plain `Trainer` is given `StopAtSignal()`

In training the current optimizer step ends, a checkpoint is written and `Stopped` is raised; all ranks stop at the same
step. Anywhere else (reading data, the final evaluation, the final save) `Stopped` is raised at once: what it cuts short is
done anew by the resumed run. A second signal ends the process at once. `Stopped` is a `SystemExit` with code 128 + signal:
143 for SIGTERM, 130 for SIGINT.

transformers' `enable_jit_checkpoint` is not used: it returns from `train` as a finished training does, so that a recipe
would go on to its next stage, and it may save between the backward pass and the optimizer step.
"""

import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 2.0  # Ctrl-C reaches a worker twice: from the terminal and from its launcher
GRACE_SECONDS = 10.0  # for what is not training and does not end by itself, as a rank that waits for another
WATCH_SECONDS = 0.5


class Stopped(SystemExit):
    """Ends the process with 128 + signal.

    Attributes:
        signum: SIGTERM or SIGINT.
        checkpoint: folder of the step that was written last; None where nothing was being trained.
    """

    def __init__(self, signum: int, step: int | None = None, checkpoint: str | None = None):
        super().__init__(128 + signum)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if self.checkpoint is None:
            return f"stopped by {name}; the run is unfinished. The same command with --resume goes on."
        return (
            f"stopped by {name} after step {self.step}; the run is unfinished. The same command with --resume goes on "
            f"from {self.checkpoint}."
        )


class EvaluationCut(BaseException):
    """Leaves an evaluation inside training; the resumed run makes it up."""


class _Request:
    """What the signal handler has seen, and whether training is to react to it."""

    def __init__(self):
        self.active, self.training = False, False
        self.clear()

    def clear(self) -> None:
        self.signum: int | None = None
        self.since = 0.0
        self.process = os.getpid()

    def receive(self, signum: int) -> bool:
        """Notes a signal; True for one that repeats an earlier one on purpose."""
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            return False
        return time.monotonic() - self.since > REPEAT_SECONDS


_request = _Request()


def _handle(signum: int, frame: Any) -> None:
    if os.getpid() != _request.process:
        # A worker of a DataLoader, forked from this process: its parent ends it.
        return
    first = _request.signum is None
    if _request.receive(signum):
        os._exit(128 + signum)
    if not _request.training:
        raise Stopped(_request.signum or signum)
    if first:
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: ending after this step, with a checkpoint; once more ends at once\n".encode())


def training_is_over() -> None:
    """From here on a signal ends the process at once; for a training that an error has ended."""
    _request.training = False


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT end training with a checkpoint, and everything else at once.

    A signal that the process was told to ignore stays ignored. Does nothing in threads other than the main one, where
    Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread() or _request.active:
        yield
        return
    _request.clear()
    _request.active, _request.training = True, False
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python runs a handler between two of its own instructions; this descriptor tells the watcher of a signal even while
    # the main thread waits inside a collective.
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _handle)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        watcher.join()
        os.close(reading)
        os.close(writing)
        _request.active = False


def _watch(reading: int, ended: threading.Event) -> None:
    """Stops the run whose launcher has gone, and ends one that a signal outside training did not end."""
    parent, alone, told = os.getppid(), _launcher_has_gone(), None
    while not ended.is_set():
        if select.select([reading], [], [], WATCH_SECONDS)[0]:
            numbers = [number for number in os.read(reading, 64) if number in SIGNALS]
            if numbers and told is None:
                told = (time.monotonic(), numbers[0])
        if told is None and (alone or (_launched() and os.getppid() != parent)):
            alone, parent = False, os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)
        if told is not None and not _request.training and time.monotonic() - told[0] > GRACE_SECONDS:
            os._exit(128 + told[1])


def _launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _launcher_has_gone() -> bool:
    """Whether `accelerate launch` ended while its only process was still importing.

    It starts that process in its own process group; whoever inherits an orphan has another. torchrun gives every worker a
    group of its own, and ends its workers itself.
    """
    if not _launched() or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    try:
        return os.getpgid(os.getppid()) != os.getpgrp()
    except OSError:
        return True


def _agreed_signal() -> int | None:
    """The signal that any rank has received, the same on all ranks; None for none."""
    if not _request.active:
        return None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _request.signum
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    number = torch.tensor(_request.signum or 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number) or None


class StopAtSignal(TrainerCallback):
    """Ends training after the step in which a signal came: writes a checkpoint of it and raises `Stopped`.

    Args:
        trainer: a `CompressionTrainer`. With one, an evaluation that is due at that step, or that the signal cuts short, is
            left to the resumed run (`make_up_evaluation`), and the trackers are closed.
    """

    def __init__(self, trainer: Any = None):
        self.trainer = trainer
        self._stopping: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._stopping = None
        _request.training = _request.active

    def on_step_end(self, args, state, control, **kwargs):
        self._stop(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop(state, control)

    def _stop(self, state, control) -> None:
        number = _agreed_signal()
        if number is not None:
            self.stop(number, state, control)

    def stop(self, number: int, state, control) -> None:
        """Asks Trainer for a checkpoint, whose log says which signal ended the run and whether an evaluation is due."""
        self._stopping = number
        state.log_history.append(
            {
                "stopped_by": signal.Signals(number).name,
                "epoch": state.epoch,
                "step": state.global_step,
                "evaluation_due": bool(control.should_evaluate),
            }
        )
        control.should_evaluate, control.should_save = False, True

    def on_prediction_step(self, args, state, control, **kwargs):
        # Ranks do not take equally many steps of an evaluation, so that they could not agree here.
        if self.trainer is not None and _request.training and _request.signum is not None and args.world_size == 1:
            raise EvaluationCut

    def on_save(self, args, state, control, **kwargs):
        if self._stopping is None and not (args.eval_strategy == "epoch" and float(state.epoch or 0).is_integer()):
            # The signal came while this checkpoint was being written, and nothing else is due at its step.
            self._stopping = _agreed_signal()
        if self._stopping is None:
            return
        if self.trainer is not None:
            self.trainer.callback_handler.on_train_end(args, state, control)
        self._leave(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self._stopping is None:
            # Between the last step and here: the model of that step is whole, what follows is not done.
            self._stopping = _agreed_signal()
            if self._stopping is not None:
                self._leave(args, state)
        _request.training = False

    def _leave(self, args, state) -> None:
        assert self._stopping is not None
        _request.training = False
        raise Stopped(
            self._stopping, state.global_step, os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        )


def evaluate_or_stop(trainer: Any, stopper: StopAtSignal, proceed: Any) -> None:
    """Runs `proceed`, Trainer's log, evaluation and save of a step; a signal during the evaluation saves without it.

    The checkpoint then holds the random states of before the evaluation.
    """
    if not trainer.control.should_evaluate:
        return proceed()
    with tempfile.TemporaryDirectory() as states:
        trainer._save_rng_state(states)
        try:
            return proceed()
        except EvaluationCut:
            trainer._load_rng_state(states)
            assert _request.signum is not None
            stopper.stop(_request.signum, trainer.state, trainer.control)
    return proceed()


def make_up_evaluation(trainer: Any, checkpoint: str) -> tempfile.TemporaryDirectory | None:
    """The evaluation that a signal left to the run that goes on from `checkpoint`; nothing where none is due.

    Returns:
        a folder with the random states behind the evaluation, with which training goes on.
    """
    due = next((entry for entry in reversed(trainer.state.log_history) if entry.get("evaluation_due")), None)
    if due is None:
        return None
    due["evaluation_due"] = False
    trainer._load_rng_state(checkpoint)
    trainer.control.should_evaluate, trainer.control.should_log, trainer.control.should_save = True, False, False
    trainer._maybe_log_save_evaluate(
        trainer._tr_loss, None, trainer.model_wrapped, None, trainer.state.epoch, None, time.time()
    )
    trainer.control.should_evaluate = trainer.control.should_save = False
    states = tempfile.TemporaryDirectory()
    trainer._save_rng_state(states.name)
    return states


def report_stop(stopped: Stopped) -> None:
    """Says why the process ends; where several ranks were training, they end together."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        print(stopped, file=sys.stderr, flush=True)
    if several and stopped.checkpoint is None:
        # The other ranks wait for this one, and the backend's threads for them; the launcher ends them.
        sys.stdout.flush()
        os._exit(int(stopped.code or 1))
