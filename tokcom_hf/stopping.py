"""SIGTERM, SIGINT and a launcher that is gone: training ends with a checkpoint of its step, and exits as unfinished.

    with stop_on_signals():     # `run_recipe` does this
        trainer.train(...)      # CompressionTrainer has `StopAtSignal`; a plain `Trainer` is given it as a callback

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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

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
            return f"stopped by {name}; the run is unfinished."
        return (
            f"stopped by {name} after step {self.step}; the run is unfinished. The same command with --resume goes on "
            f"from {self.checkpoint}."
        )


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
        return  # see `_in_child`
    first = _request.signum is None
    if _request.receive(signum):
        os._exit(128 + signum)
    if not _request.training:
        raise Stopped(_request.signum or signum)
    if first:
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: ending after this step, with a checkpoint; once more ends at once\n".encode())


def training_begins() -> None:
    """From here on a signal is only noted, for `agreed_signal` to tell."""
    _request.training = _request.active


def training_is_over() -> None:
    """From here on a signal ends the process at once."""
    _request.training = False


def noted_signal() -> int | None:
    """The signal that this process has received in training; None for none."""
    return _request.signum if _request.training else None


def _in_child() -> None:
    """SIGTERM ends a forked process (a worker of a DataLoader or of `Dataset.map`); SIGINT is its parent's matter."""
    if not _request.active:
        return
    _request.active = _request.training = False
    # Else a signal to the child would wake the parent's watcher.
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


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
        with suppress(BlockingIOError):  # full: the watcher is awake
            os.write(writing, b"\0")  # no signal's number; without it the watcher looks up after WATCH_SECONDS
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


def agreed_signal() -> int | None:
    """The signal that any rank has received, the same on all ranks; None for none."""
    if not _request.active:
        return None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _request.signum
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    number = torch.tensor(_request.signum or 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number) or None


def report_stop(stopped: Stopped) -> None:
    """Says why the process ends; where several ranks were training, they end together."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        print(stopped, file=sys.stderr, flush=True)
    if several and stopped.checkpoint is None:
        # The other ranks wait for this one, and the backend's threads for them; the launcher ends them.
        sys.stdout.flush()
        os._exit(int(stopped.code or 1))
