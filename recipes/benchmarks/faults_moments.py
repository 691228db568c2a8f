"""Triggers a fault at an exact moment of a run; `faults.py` installs it in a child process before the recipe starts.

A moment is counted, not timed: the n-th training step, the n-th file operation of checkpoint writes or of the final save.
File operations are opening for writing, renaming, removing, creating folders and syncing. Writing a large file counts
three times: before it, with half of the file on disk, and after it.
"""

import functools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True)
class Fault:
    """A fault and its moment.

    Attributes:
        place: where it happens: "start", "step" (a step of the last training), "checkpoint" (a file operation of that
            training's checkpoints), "final" (a file operation after that training), "evaluation" or "final_evaluation"
            (a prediction step during or after that training), "time" (after `seconds`), or "" (never).
        count: at which occurrence of the place, from 1.
        what: name of a signal, "file size" (from then on no file may grow beyond 32 kB), "delete" (removes the output
            folder) or "nan" (sets a weight to NaN).
        target: process that gets the signal, "worker" (this one) or "launcher" (its parent).
        seconds: time from the start, for the place "time".
        rank: rank of the process in which the fault happens.
    """

    place: str = ""
    count: int = 1
    what: str = "SIGKILL"
    target: str = "worker"
    seconds: float = 0.0
    rank: int = 0

    def json(self) -> str:
        return json.dumps(asdict(self))


class Moments:
    """Counts the moments of a run, writes a journal and triggers the fault at its moment.

    Args:
        fault: what happens, and when.
        folder: the run's output folder; files elsewhere are not counted.
        trainings: number of calls of `Trainer.train` in a whole run.
        journal: file that gets a JSON line for each step, and one with the counts at the end.
    """

    def __init__(self, fault: Fault, folder: str, trainings: int, journal: str):
        self.fault, self.folder, self.trainings = fault, os.path.abspath(folder), trainings
        self.counts = {
            name: 0 for name in ("step", "checkpoint", "final", "evaluation", "final_evaluation", "training")
        }
        self.saves_open, self.trainings_begun, self.trainings_ended, self.counting = 0, 0, 0, False
        self.trainer: Any = None
        self.rank = int(os.environ.get("RANK", "0"))
        self.started = time.monotonic()
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **entry: Any) -> None:
        line = json.dumps({"rank": self.rank, "pid": os.getpid(), "seconds": time.monotonic() - self.started} | entry)
        os.write(self.journal, (line + "\n").encode())

    # ------------------------------------------------------------------ counting
    def reached(self, place: str) -> bool:
        """Counts a moment; True if the fault is due."""
        self.counts[place] = self.counts.get(place, 0) + 1
        fault = self.fault
        return fault.place == place and fault.count == self.counts[place] and fault.rank == self.rank

    def at(self, place: str) -> None:
        """Counts a moment, and triggers the fault if it is due."""
        if self.reached(place):
            self.strike()

    def file_place(self) -> str | None:
        """The place of a file operation at this time: "checkpoint", "final", or None for neither."""
        if self.saves_open and self.trainings_begun == self.trainings:
            return "checkpoint"
        return "final" if self.trainings_ended == self.trainings else None

    def file_operation(self, path: Any) -> None:
        place = self.file_place()
        if place is None or self.counting or not self.is_own(path):
            return
        self.counting = True
        try:
            self.at(place)
        finally:
            self.counting = False

    def is_own(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(
            self.folder
        )

    # ------------------------------------------------------------------ the fault
    def strike(self) -> None:
        """Triggers the fault."""
        fault = self.fault
        self.write(event="fault", place=fault.place, counts=self.counts)
        if fault.what == "file size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif fault.what == "delete":
            shutil.rmtree(self.folder)
        elif fault.what == "nan":
            parameter = next(p for p in self.trainer.model.parameters() if p.requires_grad)
            with torch.no_grad():
                parameter.view(-1)[0] = float("nan")
        else:
            target = os.getppid() if fault.target == "launcher" else os.getpid()
            os.kill(target, getattr(signal, fault.what))

    def torn(self, path: Any) -> None:
        """Counts the moment at which half of `path` is on disk; a SIGKILL then leaves only that half."""
        place = self.file_place()
        if place is None or not self.is_own(path) or not os.path.isfile(path):
            return
        if self.reached(place):
            if self.fault.what == "SIGKILL":
                os.truncate(path, os.path.getsize(path) // 2)
            self.strike()

    # ------------------------------------------------------------------ hooks
    def install(self) -> None:
        """Hooks into torch, transformers and file operations for good: call it in a child process."""
        sys.addaudithook(self.audit)
        for module, name, argument in (
            (torch, "save", 1), (safetensors.torch, "serialize_file", 1), (Path, "write_text", 0), (os, "fsync", None),
        ):  # fmt: skip
            setattr(module, name, self.around(getattr(module, name), argument))
        hook = self.hook
        hook(Trainer, "train", self.train)
        hook(Trainer, "_save_checkpoint", self.save_checkpoint)
        hook(Trainer, "training_step", self.training_step)
        hook(Trainer, "prediction_step", self.prediction_step)
        for cls in _subclasses(Trainer):
            for name, wrapper in (("prediction_step", self.prediction_step), ("training_step", self.training_step)):
                if name in vars(cls):
                    hook(cls, name, wrapper)
        hook(CallbackHandler, "on_step_end", self.step_end)
        if self.fault.place == "time":
            timer = threading.Timer(self.fault.seconds, self.strike)
            timer.daemon = True
            timer.start()

    @staticmethod
    def hook(owner: Any, name: str, wrapper: Callable) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, wrapped)

    def around(self, original: Callable, argument: int | None) -> Callable:
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            path = args[argument] if argument is not None and len(args) > argument else kwargs.get("f", self.folder)
            self.file_operation(path)
            result = original(*args, **kwargs)
            if argument is not None:
                self.torn(path)
                self.file_operation(path)
            return result

        return wrapped

    def audit(self, event: str, args: tuple) -> None:
        if (event == "open" and args[2] & WRITING) or event in FILE_EVENTS:
            self.file_operation(args[0])

    def train(self, original, trainer, *args, **kwargs):
        self.trainings_begun += 1
        self.trainer = trainer
        try:
            return original(trainer, *args, **kwargs)
        finally:
            self.trainings_ended += 1

    def save_checkpoint(self, original, *args, **kwargs):
        self.saves_open += 1
        try:
            return original(*args, **kwargs)
        finally:
            self.saves_open -= 1

    def training_step(self, original, trainer, *args, **kwargs):
        outermost = not getattr(trainer, "_in_training_step", False)
        if not outermost:
            return original(trainer, *args, **kwargs)
        trainer._in_training_step = True
        try:
            if self.trainings_begun == self.trainings:
                self.at("step")
            return original(trainer, *args, **kwargs)
        finally:
            trainer._in_training_step = False

    def prediction_step(self, original, trainer, *args, **kwargs):
        if self.trainings_begun == self.trainings:
            self.at("final_evaluation" if self.trainings_ended == self.trainings else "evaluation")
        return original(trainer, *args, **kwargs)

    def step_end(self, original, handler, args, state, control):
        self.write(event="step", training=os.path.basename(args.output_dir), step=state.global_step)
        return original(handler, args, state, control)


def _subclasses(cls: type) -> list[type]:
    return [inner for sub in cls.__subclasses__() for inner in (sub, *_subclasses(sub))]
