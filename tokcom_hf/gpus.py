"""Restricts a run to some GPUs, by the documented settings `available_gpus` and `gpus_per_subtask`."""

import os
from collections.abc import Sequence

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def use_gpus(available: Sequence[int] | None, per_run: int | None = None) -> str | None:
    """Makes the first `per_run` of the available GPUs visible to this run; call it before CUDA is initialised.

    Args:
        available: indices of the GPUs that may be used, among the visible ones; None allows all visible GPUs.
        per_run: number of GPUs of one run, one per process; None means the number of processes that were started.

    Returns:
        A sentence for the user; None if both arguments are None.

    Raises:
        ValueError: the GPU numbers are invalid or not there, or `per_run` differs from the number of processes.
    """
    if available is None and per_run is None:
        return None
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if available is not None and (not available or len(set(available)) < len(available) or min(available) < 0):
        raise ValueError(f"available_gpus must be a list of different GPU numbers from 0 on, got {list(available)}.")
    wanted = processes if per_run is None else per_run
    if wanted < 1 or (available is not None and wanted > len(available)):
        raise ValueError(
            f"gpus_per_subtask must be at least 1 and at most the number of available_gpus, got gpus_per_subtask={wanted} "
            f"and available_gpus={available}."
        )
    if not torch.backends.cuda.is_built() or (VISIBLE not in os.environ and torch.cuda.device_count() == 0):
        return "This machine has no CUDA device: available_gpus and gpus_per_subtask have no effect, the run uses the CPU."
    if wanted != processes:
        raise ValueError(
            f"gpus_per_subtask {wanted} needs as many processes, one per GPU, got {processes}; start the recipe with "
            f"`accelerate launch --num_processes {wanted}`."
        )
    visible = (
        os.environ[VISIBLE].split(",") if VISIBLE in os.environ else list(map(str, range(torch.cuda.device_count())))
    )
    numbers = list(range(len(visible))) if available is None else list(available)
    missing = [number for number in numbers if number >= len(visible)]
    if missing:
        raise ValueError(
            f"available_gpus names {missing}, but this machine has {len(visible)} visible GPU(s), numbered from 0."
        )
    os.environ[VISIBLE] = ",".join(visible[number] for number in numbers[:wanted])
    return f"The run uses GPU {os.environ[VISIBLE]}."
