"""Training arguments that every trainer of the package has."""

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import has_length

from ..checkpoints import AVERAGE_FILE
from ..run_arguments import require_positive


@dataclass
class CompressionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the fields shared by every stage of the package."""

    builds_own_optimizer: ClassVar[bool] = False

    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of the averaged weights in [0, 1); 0 turns averaging off."},
    )
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "Decay by min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start."},
    )
    stop_on_nonfinite_loss: bool = field(
        default=True,
        metadata={"help": "Stop at the first NaN or infinite loss or gradient norm instead of training on."},
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after this many evaluations without improvement; 0 never stops early."}
    )
    wandb_project: str | None = field(
        default=None,
        metadata={"help": "Project of `--report_to wandb`; by default the environment's WANDB_PROJECT."},
    )
    muon_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Learning rate of Muon for matrices of hidden layers; 0 trains everything with `optim`."},
    )

    def __post_init__(self):
        if self.early_stopping_patience and self.metric_for_best_model is None:
            # Trainer sets its default, the loss, for `load_best_model_at_end` alone.
            self.metric_for_best_model = "loss"
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if (self.bf16 or ranks > 1) and not torch.accelerator.is_available():
            # Without an accelerator transformers needs `use_cpu`; else it refuses bf16, and each rank trains alone.
            self.use_cpu = True
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            # Every parameter of the package's models takes part in every step, and the search costs a pass over the graph.
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available():
            # Pinned memory is for copies to an accelerator; without one torch only warns.
            self.dataloader_pin_memory = False
        unknown = [name for name in self.report_to if name not in INTEGRATION_TO_CALLBACK]
        if unknown:
            raise ValueError(
                f"report_to {', '.join(map(repr, unknown))} is no tracker that transformers knows: "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}, or none."
            )
        # transformers leaves these to the data loader and the optimizer, which are built when the run has begun.
        require_positive(
            self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"
        )
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            if not 0.0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if getattr(self, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint would end training as if it were finished; leave it out: at SIGTERM and SIGINT every "
                "recipe writes a checkpoint and ends as unfinished, and other programs use tokcom_hf.stopping."
            )
        own_optimizer = self.muon_learning_rate > 0 or self.builds_own_optimizer
        if own_optimizer and (self.optim != _default(TrainingArguments, "optim") or self.optim_args):
            advice = "leave it out" if self.builds_own_optimizer else "leave it out, or set --muon_learning_rate 0"
            name = getattr(self.optim, "value", self.optim)
            raise ValueError(
                f"This training builds its own optimizer, so that --optim {name} would do nothing; {advice}."
            )
        if self.builds_own_optimizer and self.muon_learning_rate > 0:
            raise ValueError(
                f"muon_learning_rate {self.muon_learning_rate} would do nothing: this training has an AdamW with one "
                "group per part; leave it out."
            )
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must not be negative, got {self.early_stopping_patience}.")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise ValueError(
                f"early_stopping_patience {self.early_stopping_patience} counts evaluations, and eval_strategy is 'no'; "
                "set --eval_strategy steps (and --eval_steps) or epoch."
            )


def checked_arguments(args: Any, kind: type[CompressionTrainingArguments], trainer: str) -> Any:
    """`args`, or the defaults for None.

    Args:
        args: what a trainer was given.
        kind: class that the trainer needs.
        trainer: name of the trainer, for the error.

    Raises:
        TypeError: `args` is of another class, which lacks this trainer's fields.
    """
    if args is None:
        return kind(output_dir="tmp_trainer")
    if not isinstance(args, kind):
        raise TypeError(f"{trainer} needs args of class {kind.__name__}, got {type(args).__name__}.")
    return args


def with_batches(loader: Any, batch_size: int, processes: int) -> Any:
    """Returns the loader if it has a batch.

    Raises:
        ValueError: the loader has no batch, and Trainer would end at once with weights that were never trained.
    """
    if has_length(loader) and len(loader) == 0:
        raise ValueError(
            f"The training data give no batch of {batch_size} rows for each of {processes} processes; leave "
            "dataloader_drop_last out, or lower per_device_train_batch_size."
        )
    return loader


def average_files(args: CompressionTrainingArguments) -> tuple[str, ...]:
    """Names of the files of averaged weights in a checkpoint of a run with these arguments."""
    return (AVERAGE_FILE,) if args.ema_decay > 0 else ()


def _default(cls: type, name: str) -> Any:
    item = next(item for item in fields(cls) if item.name == name)
    return item.default if item.default_factory is MISSING else item.default_factory()
