"""What a checkpoint of training is, whether it is whole, and which one is the newest whole one.

A killed run leaves unfinished folders, a full disk truncated files. Everything that resumes asks here, so that one rule
decides: every file that training needs is there, can be opened, and is as long as it says.
"""

import json
import logging
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

logger = logging.getLogger(__name__)

# Beginning of the name of everything that is being written and not yet in its place.
UNFINISHED_PREFIX = ".unfinished-"
# Folder of the run in which `checkpoint-N` is written; it exists only while a checkpoint is being written.
UNFINISHED_CHECKPOINT = UNFINISHED_PREFIX + "checkpoint"
# Folder inside a model's in which the final save is written; it exists only while that is being done.
UNFINISHED_MODEL = UNFINISHED_PREFIX + "model"
# Step, world size and every file of a checkpoint with its size and SHA-256; written last.
MANIFEST_FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
AVERAGE_FILE = "ema.safetensors"
AUXILIARY_FILE = "auxiliary.pt"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")
TRAINING_FILES = ("optimizer.pt", "scheduler.pt")
RANDOM_STATES = "rng_state*.pth"  # one of a single process, else one of each rank


def checkpoints(output_dir: str | Path | None) -> Iterator[Path]:
    """The folders `checkpoint-N` directly in `output_dir`, newest (largest N) first, whole or not."""
    found = []
    for folder in Path(output_dir or ".").glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isascii() and step.isdigit() and folder.is_dir():
            found.append((int(step), folder))
    yield from (folder for _, folder in sorted(found, reverse=True))


def checkpoint_fault(folder: str | Path, required: Iterable[str] = ()) -> str | None:
    """Says what keeps training from going on from `folder`, or None where it is whole.

    Args:
        folder: a `checkpoint-N`.
        required: names of files that this run needs beside weights, optimizer, scheduler and state.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    # The state is written last: without it saving was cut short.
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError):
        return f"{STATE_FILE} cannot be read"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{STATE_FILE} does not say at which step it was saved"
    weights = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not weights:
        return "model.safetensors is missing"
    states = [path.name for path in folder.glob(RANDOM_STATES)] or ["rng_state.pth"]
    names = [weights[0], *TRAINING_FILES, *states, *required]
    if weights[0].endswith(".index.json"):
        try:
            index = json.loads((folder / weights[0]).read_text(encoding="utf-8"))
            names += sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{weights[0]} cannot be read"
    faults = (_file_fault(folder / name) for name in dict.fromkeys(names))
    return next((fault for fault in faults if fault is not None), None)


def _file_fault(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if path.suffix == ".safetensors" and not _whole_safetensors(path):
            return f"{path.name} is cut short"
        # torch.save writes a zip archive, whose directory comes last.
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    except (OSError, ValueError):
        return f"{path.name} cannot be read"
    return None


def _whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes of length, the header, and the last tensor's end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def last_complete_checkpoint(output_dir: str | Path | None, required: Iterable[str] = ()) -> str | None:
    """The newest whole `checkpoint-N` directly in `output_dir`, or None; says which newer ones are passed over.

    Args:
        output_dir: folder of the run.
        required: see `checkpoint_fault`.
    """
    required = tuple(required)
    for folder in checkpoints(output_dir):
        fault = checkpoint_fault(folder, required)
        if fault is None:
            return str(folder)
        logger.warning("%s is passed over: %s.", folder, fault)
    return None


def last_finite_checkpoint(output_dir: str | Path | None, required: Iterable[str] = ()) -> str | None:
    """The newest whole `checkpoint-N` directly in `output_dir` whose weights hold no NaN and no infinity, or None."""
    required = tuple(required)
    for folder in checkpoints(output_dir):
        if checkpoint_fault(folder, required) is None and _finite(folder):
            return str(folder)
    return None


def _finite(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118 (no dictionary)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point()):
                return False
    return True


def choose_checkpoint(
    output_dir: str | Path | None, wanted: str | bool | None, required: Iterable[str] = ()
) -> str | None:
    """The one rule by which training goes on.

    Args:
        output_dir: folder of the run.
        wanted: None or False starts at the beginning; True goes on from the newest whole checkpoint of `output_dir`, and
            starts at the beginning where there is no checkpoint yet; a path goes on from that checkpoint.
        required: see `checkpoint_fault`.

    Returns:
        a whole checkpoint, or None to start at the beginning.

    Raises:
        ValueError: the named checkpoint is not whole, or there are checkpoints and none of them is.
    """
    required = tuple(required)
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        fault = checkpoint_fault(wanted, required)
        if fault is not None:
            raise ValueError(
                f"Training cannot go on from {str(wanted)!r}: {fault}. Name a whole folder checkpoint-N, or use "
                "--resume_from_checkpoint true for the newest one."
            )
        return str(wanted)
    last = last_complete_checkpoint(output_dir, required)
    if last is None and (faults := [(f.name, checkpoint_fault(f, required)) for f in checkpoints(output_dir)]):
        told = "; ".join(f"{name}: {fault}" for name, fault in faults[:3])
        raise ValueError(f"No checkpoint in {str(output_dir)!r} is whole ({told}). Start over with --overwrite.")
    return last


def newest_state(output_dir: str | Path) -> dict[str, Any] | None:
    """The trainer state of the newest `checkpoint-N` that has a readable one, or None."""
    for folder in checkpoints(output_dir):
        try:
            return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None
