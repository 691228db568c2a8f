"""Runs of other processes: a script of this folder, alone or on several ranks, and an end without a goodbye."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


class Kill(TrainerCallback):
    """Kills the process once `after` steps are done."""

    def __init__(self, after: int):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def start(module: str, *arguments, launcher: tuple[str, ...] = (), check: bool = True) -> int:
    """Runs `python -m tests.helpers.MODULE ARGUMENTS`, behind a launcher's own arguments; returns its exit code.

    Raises:
        AssertionError: `check` is set and the process failed.
    """
    command = [sys.executable, *launcher, "-m", f"tests.helpers.{module}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.returncode
