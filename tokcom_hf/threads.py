"""Processor threads of a recipe."""

import os

import torch
from accelerate import PartialState


def available_cores() -> int:
    """Cores this process may run on."""
    # Only Linux tells which cores are this process's own.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(threads: int | None = None) -> None:
    """Lets a single process on a CPU use `threads` threads, or all its cores for None and 0; leaves any other run alone.

    `accelerate launch` gives each process one thread, which a single one need not share.
    """
    state = PartialState()
    if state.num_processes == 1 and state.device.type == "cpu":
        torch.set_num_threads(threads or available_cores())
