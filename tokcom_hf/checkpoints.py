"""Checks training checkpoints, and finds the newest one that is whole: complete and undamaged.

A checkpoint is written under a temporary name, gets a manifest of its files, and is renamed into place last. It may still be
damaged later, so all code that resumes uses the checks of this module. A checkpoint with a manifest is whole if its files
match the manifest byte for byte. A checkpoint of an older release has no manifest: it is whole if every file that training
needs exists, can be opened, and has the length that its header states.
"""

import json
import logging
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_leaves

from .manifests import MANIFEST_FILE, files_fault, read_manifest, settings_difference
from .whole_files import UNFINISHED_MODEL, UNFINISHED_PREFIX

__all__ = [
    "MANIFEST_FILE",
    "UNFINISHED_CHECKPOINT",
    "UNFINISHED_MODEL",
    "UNFINISHED_PREFIX",
    "checkpoint_fault",
    "checkpoints",
    "choose_checkpoint",
    "content_fault",
    "last_complete_checkpoint",
    "last_finite_checkpoint",
    "newest_state",
]

logger = logging.getLogger(__name__)

# Folder of the run in which `checkpoint-N` is written; it exists only while a checkpoint is being written.
UNFINISHED_CHECKPOINT = UNFINISHED_PREFIX + "checkpoint"
STATE_FILE = "trainer_state.json"
AVERAGE_FILE = "ema.safetensors"
AUXILIARY_FILE = "auxiliary.pt"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")
TRAINING_FILES = ("optimizer.pt", "scheduler.pt")
RANDOM_STATES = "rng_state*.pth"  # one file, or one per rank


def checkpoints(output_dir: str | Path | None) -> Iterator[Path]:
    """Yields the folders `checkpoint-N` directly in `output_dir`, whole or not, the newest (largest N) first."""
    found = []
    for folder in Path(output_dir or ".").glob("checkpoint-*"):
        step = step_of(folder)
        if step is not None and folder.is_dir():
            found.append((step, folder))
    yield from (folder for _, folder in sorted(found, reverse=True))


def step_of(folder: str | Path) -> int | None:
    """Returns N if the folder is named `checkpoint-N`, else None."""
    name = Path(folder).name
    step = name.removeprefix("checkpoint-")
    return int(step) if name != step and step.isascii() and step.isdigit() else None


def checkpoint_fault(
    folder: str | Path, required: Iterable[str] = (), settings: Mapping[str, Any] | None = None
) -> str | None:
    """Returns why training cannot resume from `folder`, as a phrase, or None if the checkpoint is whole.

    Args:
        folder: a folder `checkpoint-N`.
        required: names of files that the run needs in addition to weights, optimizer, scheduler and trainer state.
        settings: settings of the run that resumes, which must match those of the checkpoint; None skips this check.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    # The state is written after weights and optimizer: if it is missing, saving was interrupted.
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError):
        return f"{STATE_FILE} cannot be read"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{STATE_FILE} does not say at which step it was saved"
    step = step_of(folder)
    if step is not None and step != state["global_step"]:
        return f"it was saved at step {state['global_step']}"
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return _fault_without_manifest(folder, required)
    return _manifest_fault(folder, manifest, required, settings)


def content_fault(folder: str | Path) -> str | None:
    """Returns how the files of a checkpoint differ from its manifest; None if they match or there is no manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    return None if manifest is None else files_fault(Path(folder), manifest["files"])


def _manifest_fault(folder: Path, manifest: dict[str, Any], required: Iterable[str], settings) -> str | None:
    step = step_of(folder)
    if step is not None and step != manifest.get("step"):
        return f"its {MANIFEST_FILE} belongs to step {manifest.get('step')}"
    lacking = next((name for name in required if name not in manifest["files"]), None)
    if lacking is not None:
        return f"{lacking} is missing"
    if not manifest.get("resumable", True):
        return "it holds weights only (save_only_model)"
    if settings is not None and (difference := settings_difference(manifest.get("settings") or {}, settings)):
        return f"another run saved it, with other data or settings: {difference}"
    return files_fault(folder, manifest["files"])


def _fault_without_manifest(folder: Path, required: Iterable[str]) -> str | None:
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
        # torch.save writes a zip archive; its directory comes last, so a truncated file is no zip file.
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    except (OSError, ValueError):
        return f"{path.name} cannot be read"
    return None


def _whole_safetensors(path: Path) -> bool:
    """Returns whether the file is as long as its header states: 8 bytes of header length, the header, and all tensors."""
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


def last_complete_checkpoint(
    output_dir: str | Path | None, required: Iterable[str] = (), settings: Mapping[str, Any] | None = None
) -> str | None:
    """Returns the newest whole `checkpoint-N` directly in `output_dir`, or None; logs a warning for each newer one it skips.

    Args:
        output_dir: folder of the run.
        required, settings: see `checkpoint_fault`.
    """
    required = tuple(required)
    for folder in checkpoints(output_dir):
        fault = checkpoint_fault(folder, required, settings)
        if fault is None:
            return str(folder)
        logger.warning("%s is passed over: %s.", folder, fault)
    return None


def last_finite_checkpoint(output_dir: str | Path | None, required: Iterable[str] = ()) -> str | None:
    """Returns the newest whole `checkpoint-N` directly in `output_dir` without NaN or infinite values, or None.

    Trainers check every tensor before they save it, and the manifest proves that the files have not changed since. The
    tensors of a checkpoint without a manifest are checked here.
    """
    required = tuple(required)
    for folder in checkpoints(output_dir):
        if checkpoint_fault(folder, required) is None and ((folder / MANIFEST_FILE).is_file() or _finite(folder)):
            return str(folder)
    return None


def _finite(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if not all(_is_finite(file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118 (no dictionary)
                return False
    for name in ("optimizer.pt", AUXILIARY_FILE):
        if (folder / name).is_file():
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
            if not all(_is_finite(tensor) for tensor in tree_leaves(state) if isinstance(tensor, torch.Tensor)):
                return False
    return True


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def choose_checkpoint(
    output_dir: str | Path | None,
    wanted: str | bool | None,
    required: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str | None:
    """Chooses the checkpoint from which training resumes.

    Args:
        output_dir: folder of the run.
        wanted: None or False starts from the beginning. True resumes from the newest whole checkpoint of `output_dir`, or
            starts from the beginning if there is no checkpoint yet. A path resumes from that checkpoint.
        required, settings: see `checkpoint_fault`.

    Returns:
        the path of a whole checkpoint, or None to start from the beginning.

    Raises:
        ValueError: the named checkpoint is not whole, or `output_dir` has checkpoints but none is whole.
    """
    required = tuple(required)
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        fault = checkpoint_fault(wanted, required, settings)
        if fault is not None:
            raise ValueError(
                f"Training cannot go on from {str(wanted)!r}: {fault}. Name a whole folder checkpoint-N, or use "
                "--resume_from_checkpoint true for the newest one."
            )
        _tell_unlisted(wanted)
        return str(wanted)
    last = last_complete_checkpoint(output_dir, required, settings)
    if last is None:
        faults = [(folder.name, checkpoint_fault(folder, required, settings)) for folder in checkpoints(output_dir)]
        if faults:
            told = "; ".join(f"{name}: {fault}" for name, fault in faults[:3])
            raise ValueError(f"No checkpoint in {str(output_dir)!r} is whole ({told}). Start over with --overwrite.")
    else:
        _tell_unlisted(last)
    return last


def _tell_unlisted(folder: str | Path) -> None:
    if not (Path(folder) / MANIFEST_FILE).is_file():
        logger.warning(
            "%s has no %s, like all checkpoints of older releases, so only "
            "the structure of its files was checked, not every byte.",
            folder,
            MANIFEST_FILE,
        )


def newest_state(output_dir: str | Path) -> dict[str, Any] | None:
    """Returns the trainer state of the newest `checkpoint-N` whose state can be read, or None."""
    for folder in checkpoints(output_dir):
        try:
            return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None
