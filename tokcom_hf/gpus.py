"""Which GPUs a run may use, by the documented settings `available_gpus` and `gpus_per_subtask`."""

import os
from collections.abc import Sequence

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def use_gpus(available: Sequence[int] | None, per_run: int | None = None) -> str | None:
    """Lets this run see the first `per_run` of the available GPUs; call it before anything else touches CUDA.

    Args:
        available: numbers of the GPUs that may be used, counted among those that are visible already; None for all.
        per_run: GPUs, and so processes, of one run; as many as processes were started where None.

    Returns:
        A sentence for the user; None where nothing was asked for.

    Raises:
        ValueError: numbers that make no sense or are not there, or another number of processes than `per_run`.
    """
    if available is None and per_run is None:
        return None
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if available is not None and (not available or len(set(available)) < len(available) or min(available) < 0):
        raise ValueError(f"available_gpus is a list of different GPU numbers from 0 on, got {list(available)}.")
    wanted = processes if per_run is None else per_run
    if wanted < 1 or (available is not None and wanted > len(available)):
        raise ValueError(f"gpus_per_subtask {wanted} does not fit available_gpus {available}.")
    if not torch.backends.cuda.is_built() or (VISIBLE not in os.environ and torch.cuda.device_count() == 0):
        return "This machine has no CUDA device; available_gpus and gpus_per_subtask change nothing, the run uses the CPU."
    if wanted != processes:
        raise ValueError(
            f"gpus_per_subtask {wanted}: each GPU has a process of its own, and {processes} runs; start the recipe with "
            f"`accelerate launch --num_processes {wanted}`."
        )
    visible = (
        os.environ[VISIBLE].split(",") if VISIBLE in os.environ else list(map(str, range(torch.cuda.device_count())))
    )
    numbers = list(range(len(visible))) if available is None else list(available)
    missing = [number for number in numbers if number >= len(visible)]
    if missing:
        raise ValueError(f"available_gpus names {missing}, but this machine shows {len(visible)} GPU(s), from 0 on.")
    os.environ[VISIBLE] = ",".join(visible[number] for number in numbers[:wanted])
    return f"The run uses GPU {os.environ[VISIBLE]}."
