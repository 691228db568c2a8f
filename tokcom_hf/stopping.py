"""Stops training with a checkpoint on SIGTERM, on SIGINT, or when the launcher has exited.

    with stop_on_signals():     # `run_recipe` does this
        trainer.train(...)      # CompressionTrainer has `StopAtSignal`; add it to a plain `Trainer` as a callback

During training, the current optimizer step is finished, a checkpoint is written and `Stopped` is raised; all ranks stop at
the same step. At any other time (reading data, the final evaluation, the final save) `Stopped` is raised at once, and the
resumed run repeats the interrupted work. A second signal ends the process at once. `Stopped` is a `SystemExit` with code
128 + signal: 143 for SIGTERM, 130 for SIGINT.

transformers' `enable_jit_checkpoint` is not used, because it returns from `train` like a finished training, so a recipe
would continue with its next stage, and because it may save between the backward pass and the optimizer step.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 2.0  # signals within this time count once: Ctrl-C reaches a worker from the terminal and its launcher
GRACE_SECONDS = 10.0  # outside training, a process that a signal has not ended by then is killed
WATCH_SECONDS = 0.5


class Stopped(SystemExit):
    """Ends the process with exit code 128 + signal.

    Attributes:
        signum: SIGTERM or SIGINT.
        step: optimizer step after which training stopped; None outside training.
        checkpoint: folder of that step's checkpoint; None outside training.
    """

    def __init__(self, signum: int, step: int | None = None, checkpoint: str | None = None):
        super().__init__(128 + signum)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if self.checkpoint is None:
            return f"stopped by {name}; the run is unfinished."
        return (
            f"stopped by {name} after step {self.step}; the run is unfinished. The same command with --resume resumes it "
            f"from {self.checkpoint}."
        )


class _Request:
    """The signal that the handler has received, and whether training will react to it."""

    def __init__(self):
        self.active, self.training = False, False
        self.clear()

    def clear(self) -> None:
        self.signum: int | None = None
        self.since = 0.0
        self.process = os.getpid()

    def receive(self, signum: int) -> bool:
        """Records a signal; returns True for a second one, more than `REPEAT_SECONDS` after the first."""
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            return False
        return time.monotonic() - self.since > REPEAT_SECONDS


_request = _Request()


def _handle(signum: int, frame: Any) -> None:
    if os.getpid() != _request.process:
        return  # a forked child, see `_in_child`
    first = _request.signum is None
    if _request.receive(signum):
        os._exit(128 + signum)
    if not _request.training:
        raise Stopped(_request.signum or signum)
    if first:
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint; a second signal stops at once\n".encode())


def training_begins() -> None:
    """From now on a signal is only recorded; `agreed_signal` returns it."""
    _request.training = _request.active


def training_is_over() -> None:
    """From now on a signal ends the process at once."""
    _request.training = False


def noted_signal() -> int | None:
    """Returns the signal that this process has received during training, or None."""
    return _request.signum if _request.training else None


def _in_child() -> None:
    """Makes SIGTERM end a forked child (a worker of a DataLoader or of `Dataset.map`); SIGINT is left to the parent."""
    if not _request.active:
        return
    _request.active = _request.training = False
    # Otherwise a signal to the child would wake the parent's watcher thread.
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGINT end training with a checkpoint, and any other work at once.

    A signal that the process ignores stays ignored. In threads other than the main one this does nothing, because Python
    sets signal handlers only in the main thread.
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
    # Python runs handlers only between bytecode instructions; the wakeup descriptor informs the watcher even while the main
    # thread is blocked inside a collective.
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
        with suppress(BlockingIOError):  # the pipe is full, so the watcher is awake
            os.write(writing, b"\0")  # wakes the watcher before WATCH_SECONDS are over; 0 is no signal
        watcher.join()
        os.close(reading)
        os.close(writing)
        _request.active = False


def _watch(reading: int, ended: threading.Event) -> None:
    """Stops the run if its launcher has exited, and kills the process if a signal outside training has not ended it."""
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
    """Returns whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _launcher_has_gone() -> bool:
    """Returns whether `accelerate launch` exited while its only process was still importing.

    `accelerate launch` starts that process in the launcher's own process group; the process that adopts an orphan is in
    another group. torchrun gives every worker a group of its own, but it also ends its workers itself.
    """
    if not _launched() or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    try:
        return os.getpgid(os.getppid()) != os.getpgrp()
    except OSError:
        return True


def agreed_signal() -> int | None:
    """Returns a signal that any rank has received, the same on all ranks, or None."""
    if not _request.active:
        return None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _request.signum
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    number = torch.tensor(_request.signum or 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number) or None


def report_stop(stopped: Stopped) -> None:
    """Prints why the process ends; outside training, a rank of several exits at once, without waiting for the others."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        print(stopped, file=sys.stderr, flush=True)
    if several and stopped.checkpoint is None:
        # A normal exit would hang: the backend's threads wait for the other ranks. The launcher ends those.
        sys.stdout.flush()
        os._exit(int(stopped.code or 1))
