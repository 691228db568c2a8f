"""CPU threads of a recipe."""

import os

import torch
from accelerate import PartialState


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    # Only Linux reports the cores that a process is restricted to.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(threads: int | None = None) -> None:
    """Sets the number of CPU threads of a run of one process on a CPU; changes nothing for any other run.

    `accelerate launch` gives each process one thread, even if there is only one process.

    Args:
        threads: number of threads; None and 0 mean all cores of the process.

    Raises:
        ValueError: a negative number.
    """
    if threads is not None and threads < 0:
        raise ValueError(f"threads must be at least 1, or 0 for all cores, got {threads}.")
    state = PartialState()
    if state.num_processes == 1 and state.device.type == "cpu":
        torch.set_num_threads(threads or available_cores())
