"""What a resumed trainer reads from a checkpoint besides what `Trainer` reads; a missing part raises an error."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import AUXILIARY_FILE, choose_checkpoint, content_fault
from ..manifests import read_manifest
from .resumed_settings import own_settings

logger = logging.getLogger(__name__)


def save_auxiliary(auxiliary: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the states of second networks, their optimizers and schedulers into a checkpoint."""
    if auxiliary:
        torch.save({name: item.state_dict() for name, item in auxiliary.items()}, Path(folder) / AUXILIARY_FILE)


def load_auxiliary(auxiliary: Mapping[str, Any], folder: str | Path) -> None:
    """Loads the states that `save_auxiliary` wrote; optimizers keep the hyperparameters of this run.

    Raises:
        ValueError: the checkpoint lacks a state.
    """
    if not auxiliary:
        return
    path = Path(folder) / AUXILIARY_FILE
    saved = torch.load(path, map_location="cpu", weights_only=True)
    missing = sorted(set(auxiliary) - set(saved))
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, which this run trains; resume with the settings it was saved with."
        )
    optimizers = {name: item for name, item in auxiliary.items() if isinstance(item, torch.optim.Optimizer)}
    schedulers = [item for item in auxiliary.values() if hasattr(item, "base_lrs")]
    with ExitStack() as stack:
        for optimizer in optimizers.values():
            scheduler = next((item for item in schedulers if item.optimizer is optimizer), None)
            stack.enter_context(own_settings(optimizer, scheduler))
        for name, item in auxiliary.items():
            item.load_state_dict(saved[name])


def check_contents(folder: str) -> None:
    """Refuses to load the best checkpoint if its files have changed since they were written.

    Raises:
        ValueError: a file has changed; the error names it.
    """
    fault = content_fault(folder)
    if fault is not None:
        raise ValueError(f"The best checkpoint {folder!r} cannot be loaded: {fault}.")


def check_missing_keys(model: nn.Module, missing_keys: list[str]) -> None:
    """Refuses a checkpoint that lacks tensors of the model.

    Raises:
        ValueError: tensors are missing; the error names them.
    """
    tensors = model.state_dict(keep_vars=True)
    missing = set(missing_keys)
    # A tied parameter is stored once, under one of its names; a frozen base is loaded from its reference instead.
    found = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    if hasattr(getattr(model, "config", None), "base_model_name_or_path"):
        found |= {
            id(tensor) for name, tensor in tensors.items() if name.startswith("base.") and not tensor.requires_grad
        }
    lost = [name for name in missing_keys if name in tensors and id(tensors[name]) not in found]
    if lost:
        raise ValueError(
            f"The checkpoint lacks {len(lost)} of the model's {len(tensors)} tensors ({', '.join(lost[:3])}, ...); "
            "training from it would start them anew. Resume with the model it was saved from."
        )


def chosen(trainer: Any, wanted: str | bool | None) -> str | None:
    """The checkpoint from which a trainer resumes; a warning tells if another number of processes saved it.

    Args:
        trainer: a `CompressionTrainer`.
        wanted: see `choose_checkpoint`.

    Raises:
        ValueError: there is no whole checkpoint to resume from.
    """
    args = trainer.args
    checkpoint = choose_checkpoint(args.output_dir, wanted, trainer.checkpoint_files())
    if wanted is True and checkpoint is None:
        raise ValueError(f"No complete checkpoint found in {args.output_dir}; nothing to resume from.")
    if checkpoint is not None:
        _tell_other_world_size(checkpoint, args.world_size)
    return checkpoint


def _tell_other_world_size(checkpoint: str, processes: int) -> None:
    before = (read_manifest(checkpoint) or {}).get("world_size", processes)
    if before != processes:
        logger.warning(
            "%s was saved by %d processes and goes on with %d: weights and optimizers are the same, the random draws from "
            "here on are not.",
            checkpoint, before, processes,
        )  # fmt: skip
