"""What every trainer of the package adds to HF `Trainer`: averaged weights, honest stops, complete checkpoints.

Everything else (Accelerate, resume, RNG, callbacks, trackers, Hub pushes) is `Trainer`'s own.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from .muon import MuonWithAdamW, split_for_muon

AVERAGE_FILE = "ema.safetensors"
AUXILIARY_FILE = "auxiliary.pt"


@dataclass
class CompressionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the fields shared by every stage of the package."""

    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of the averaged weights in [0, 1); 0 turns averaging off."},
    )
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "Use min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start."},
    )
    stop_on_nonfinite_loss: bool = field(
        default=True, metadata={"help": "Stop at the first NaN or infinite loss instead of training on."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without improvement; 0 never stops early."}
    )
    muon_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Muon for the matrices of hidden layers, at this rate; 0 trains everything with `optim`."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            # Every parameter of the package's models takes part in every step; the search costs a pass over the graph.
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available():
            # Pinned memory is for copies to an accelerator; without one torch only warns.
            self.dataloader_pin_memory = False
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must not be negative, got {self.early_stopping_patience}.")


class _AverageCallback(TrainerCallback):
    """Updates the averaged weights after each optimizer step and restores them when a run resumes."""

    def __init__(self, trainer: "CompressionTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start_auxiliary()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.unwrapped_model)


class CompressionTrainer(Trainer):
    """Thin base of the package's trainers.

    Subclasses may override `auxiliary_state` (second networks, optimizers) and call `log_scalars` in `compute_loss`.
    """

    args: CompressionTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.average: AveragedModel | None = None
        self._resume_folder: str | None = None
        self._scalars: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.add_callback(_AverageCallback(self))
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    @property
    def unwrapped_model(self):
        """The model without its DDP or compile wrapper."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon_learning_rate == 0 or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        matrices, others = split_for_muon(self.unwrapped_model)
        self.optimizer = MuonWithAdamW(
            matrices,
            others,
            muon_learning_rate=self.args.muon_learning_rate,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
        )
        return self.optimizer

    # ------------------------------------------------------------------ what a subclass may hook into
    def auxiliary_state(self) -> dict[str, Any]:
        """Objects with `state_dict`/`load_state_dict` that a checkpoint must hold beside the model's own state."""
        return {}

    def log_scalars(self, prefix: str, values: Mapping[str, torch.Tensor | float]) -> None:
        """Remembers batch values; the next training log line holds their mean as `prefix/name`."""
        for name, value in values.items():
            self._scalars[f"{prefix}/{name}"].append(torch.as_tensor(value).detach().float())

    # ------------------------------------------------------------------ training
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No complete checkpoint found in {self.args.output_dir}; nothing to resume from.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # A run resumed from its last checkpoint has nothing left to do; Trainer itself would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.stop_on_nonfinite_loss and not torch.isfinite(loss):
            last = last_complete_checkpoint(self.args.output_dir)
            advice = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
            raise FloatingPointError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}; {advice}. "
                "Lower the learning rate or set max_grad_norm, then resume from it."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._scalars.items() if values}
            self._scalars.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------ averaged weights
    def _start_auxiliary(self) -> None:
        if self.args.ema_decay > 0:
            average = get_ema_multi_avg_fn(self.args.ema_decay)
            if self.args.ema_warmup:
                average = _warmed_up(self.args.ema_decay)
            # Buffers (codebooks, latent statistics) are copied, not averaged: use_buffers=False.
            self.average = AveragedModel(self.unwrapped_model, multi_avg_fn=average, use_buffers=False)
            self.average.requires_grad_(False)
        if self._resume_folder is not None:
            self._load_average(self._resume_folder)
            path = Path(self._resume_folder) / AUXILIARY_FILE
            auxiliary = self.auxiliary_state()
            if auxiliary and path.is_file():
                saved = torch.load(path, map_location="cpu", weights_only=True)
                for name, item in auxiliary.items():
                    item.load_state_dict(saved[name])
            self._resume_folder = None

    def _load_average(self, folder: str) -> None:
        path = Path(folder) / AVERAGE_FILE
        if self.average is not None and path.is_file():
            load_model(self.average, path)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights, where averaging is on."""
        if self.average is None:
            yield
            return
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        assert self.average is not None
        pairs = zip(self.unwrapped_model.parameters(), self.average.module.parameters(), strict=True)
        for parameter, averaged in pairs:
            parameter.data, averaged.data = averaged.data, parameter.data

    def use_averaged_weights(self) -> None:
        """Copies the averaged weights into the model for good; call it after training, before `save_model`."""
        if self.average is not None:
            pairs = zip(self.unwrapped_model.parameters(), self.average.module.parameters(), strict=True)
            for parameter, averaged in pairs:
                parameter.data.copy_(averaged.data)

    def evaluate(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Runs before trainer_state.json is written, which therefore marks a complete checkpoint.
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        if self.average is not None:
            save_model(self.average, str(Path(output_dir) / AVERAGE_FILE))
        auxiliary = self.auxiliary_state()
        if auxiliary:
            states = {name: item.state_dict() for name, item in auxiliary.items()}
            torch.save(states, Path(output_dir) / AUXILIARY_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resume_folder = resume_from_checkpoint

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(str(self.state.best_model_checkpoint))


def _warmed_up(decay: float):
    """EMA whose decay is min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's moving averages."""

    @torch.no_grad()
    def update(averaged, current, num_averaged) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    return update


def last_complete_checkpoint(output_dir: str | Path | None) -> str | None:
    """The newest `checkpoint-N` whose saving was finished, or None; a killed run may leave an unfinished one."""
    found = []
    for folder in Path(output_dir or ".").glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if step.isdigit():
            found.append((int(step), str(folder)))
    return max(found)[1] if found else None


def check_output_dir(path: str | Path, overwrite: bool = False, resume: bool = False) -> Path:
    """Refuses a non-empty output folder unless the run overwrites or resumes it; creates nothing.

    Raises:
        FileExistsError: the folder holds files and neither flag is set.
        NotADirectoryError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Output folder {str(path)!r} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not (overwrite or resume):
            raise FileExistsError(
                f"Output folder {str(path)!r} is not empty; add --resume to go on with that run, --overwrite to "
                "replace it, or name another with --output_dir."
            )
        if overwrite and not resume:
            for checkpoint in path.rglob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    return path
