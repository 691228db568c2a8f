"""Writes each part of a pruning run under its documented name, such as `checkpoints/token_merger_step_N.pt`."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

FOLDER = "checkpoints"


class SaveParts(TrainerCallback):
    """Writes one state dict per part at every checkpoint; `part.load_state_dict(torch.load(file))` reads it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        trainer, folder = self.trainer, Path(args.output_dir) / FOLDER
        model = trainer.unwrapped_model
        parts = {"token_merger": model.token_merger, "layer_pruners": model.layer_pruner}
        if trainer.discriminator is not None:
            parts["discriminator"] = trainer.accelerator.unwrap_model(trainer.discriminator)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            if part is not None:
                torch.save(part.state_dict(), folder / f"{name}_step_{state.global_step}.pt")
