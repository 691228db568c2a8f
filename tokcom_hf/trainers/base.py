"""What every trainer of the package adds to HF `Trainer`: averaged weights, honest stops, complete checkpoints.

Everything else (Accelerate, resume, RNG, callbacks, trackers, Hub pushes) is `Trainer`'s own.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..checkpoints import (
    AUXILIARY_FILE,
    AVERAGE_FILE,
    choose_checkpoint,
    last_complete_checkpoint,
    last_finite_checkpoint,
)
from ..run_folders import check_output_dir
from .clock import Clock
from .finite import nonfinite_names
from .muon import MuonWithAdamW, split_for_muon
from .resumed_settings import own_settings
from .trackers import BestModel, TrainingLog, configure_trackers, tracker_names

__all__ = [
    "CompressionTrainer",
    "CompressionTrainingArguments",
    "check_output_dir",
    "last_complete_checkpoint",
]


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
        metadata={"help": "Use min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start."},
    )
    stop_on_nonfinite_loss: bool = field(
        default=True,
        metadata={"help": "Stop at the first NaN or infinite loss or gradient norm instead of training on."},
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without improvement; 0 never stops early."}
    )
    wandb_project: str | None = field(
        default=None,
        metadata={"help": "Project of `--report_to wandb`; by default the environment's WANDB_PROJECT."},
    )
    muon_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Muon for the matrices of hidden layers, at this rate; 0 trains everything with `optim`."},
    )

    def __post_init__(self):
        if self.early_stopping_patience and self.metric_for_best_model is None:
            # Trainer sets its default, the loss, for `load_best_model_at_end` alone.
            self.metric_for_best_model = "loss"
        if self.bf16 and not torch.accelerator.is_available():
            # Without an accelerator transformers asks for this by name; bfloat16 works on the CPU, too.
            self.use_cpu = True
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            # Every parameter of the package's models takes part in every step; the search costs a pass over the graph.
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available():
            # Pinned memory is for copies to an accelerator; without one torch only warns.
            self.dataloader_pin_memory = False
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
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

    Attributes:
        arguments_class: what `args` must be; built with its defaults where `args` is None.
        stage: what `best.json` calls this training.
        data_columns: columns that the loss reads and the model's forward does not name, kept under Trainer's default
            `remove_unused_columns=True`; None where the collator reads whole rows, which turns that argument off.
    """

    args: CompressionTrainingArguments
    arguments_class: type[CompressionTrainingArguments] = CompressionTrainingArguments
    stage: str = "training"
    data_columns: tuple[str, ...] | None = ()

    def __init__(self, model=None, args=None, *positional, **kwargs):
        args = self.checked_arguments(args)
        if self.data_columns is None:
            args.remove_unused_columns = False
        self._grad_norm = 0.0
        super().__init__(model, args, *positional, **kwargs)
        configure_trackers(self)
        self.training_log = TrainingLog(self.args.output_dir)
        self.best_model = BestModel(self.args.output_dir, self.stage)
        self.average: AveragedModel | None = None
        self._resume_folder: str | None = None
        self._scalars: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._clock = Clock()
        for callback in (self._clock, self.training_log, self.best_model):
            self.add_callback(callback)
        self.add_callback(_AverageCallback(self))
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    @classmethod
    def checked_arguments(cls, args: CompressionTrainingArguments | None) -> CompressionTrainingArguments:
        """`args`, or the defaults for None.

        Raises:
            TypeError: another class of arguments, which lacks this trainer's fields.
        """
        if args is None:
            return cls.arguments_class(output_dir="tmp_trainer")
        if not isinstance(args, cls.arguments_class):
            raise TypeError(
                f"{cls.__name__} needs args of class {cls.arguments_class.__name__}, got {type(args).__name__}."
            )
        return args

    @property
    def training_seconds(self) -> float:
        """Seconds spent in `train`, those before a resume included."""
        return self._clock.seconds

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *(self.data_columns or ())]))

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
            eps=self.args.adam_epsilon,
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
        """As `Trainer.train`, going on only from whole checkpoints and ending only with finite weights.

        Raises:
            ValueError: there is no whole checkpoint to go on from.
            FloatingPointError: loss, gradient norm or weights became NaN or infinite.
        """
        checkpoint = choose_checkpoint(self.args.output_dir, resume_from_checkpoint, self.checkpoint_files())
        if resume_from_checkpoint is True and checkpoint is None:
            raise ValueError(f"No complete checkpoint found in {self.args.output_dir}; nothing to resume from.")
        output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self.check_finite()
        return output

    def _run_epoch(self, *args, **kwargs):
        # A run resumed from its last checkpoint has nothing left to do; Trainer itself would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.stop_on_nonfinite_loss and not torch.isfinite(loss):
            raise self.not_finite(f"The loss became {loss.item()}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A loss scaler skips steps of infinite gradients by design.
        self._grad_norm = 0.0 if self.accelerator.scaler is not None else float(norm)
        if self.args.stop_on_nonfinite_loss:
            self._check_grad_norm()
        return norm

    def _check_grad_norm(self) -> None:
        if not math.isfinite(self._grad_norm):
            raise self.not_finite(f"The gradient norm became {self._grad_norm}")

    def not_finite(self, what: str, step: int | None = None) -> FloatingPointError:
        """The error that ends a run whose numbers left the finite ones; it names the last checkpoint that has not.

        `step` is the one being taken where it is None.
        """
        step = self.state.global_step + 1 if step is None else step
        last = last_finite_checkpoint(self.args.output_dir, self.checkpoint_files())
        advice = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return FloatingPointError(
            f"{what} at step {step}; {advice}. Lower the learning rate or set max_grad_norm, then resume from it."
        )

    def check_finite(self) -> None:
        """Checks everything that was trained: model, averaged weights, second networks.

        Raises:
            FloatingPointError: some hold NaN or infinity; names them.
        """
        trained = {"": self.unwrapped_model, "average of ": self.average}
        trained |= {f"{name}: ": item for name, item in self.auxiliary_state().items() if isinstance(item, nn.Module)}
        bad = [
            prefix + name
            for prefix, module in trained.items()
            if module is not None
            for name in nonfinite_names(module)
        ]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            names = ", ".join(bad[:3]) + more
            raise self.not_finite(f"The weights hold NaN or infinity ({names})", self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._scalars.items() if values}
            self._scalars.clear()
        named = tracker_names(logs)
        best = self.best_model.value(self.args, logs)
        if best is not None:
            named[f"eval_best_{self.best_model.metric(self.args)}"] = best
        super().log(named, start_time)
        # Trainer adds the epoch to what `evaluate` returns.
        logs.update({name: value for name, value in named.items() if name == "epoch"})

    # ------------------------------------------------------------------ averaged weights
    def _start_auxiliary(self) -> None:
        # The state of a resumed run knows only the callbacks it was saved with; Trainer updates those of this one.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        # Nor does it know how often this run logs, saves and evaluates; Trainer would keep to the checkpoint's steps.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.args.ema_decay > 0:
            average = get_ema_multi_avg_fn(self.args.ema_decay)
            if self.args.ema_warmup:
                average = _warmed_up(self.args.ema_decay)
            # Buffers (codebooks, latent statistics) are copied, not averaged: use_buffers=False.
            self.average = AveragedModel(self.unwrapped_model, multi_avg_fn=average, use_buffers=False)
            self.average.requires_grad_(False)
        if self._resume_folder is not None:
            self._load_average(self._resume_folder)
            self._load_auxiliary(Path(self._resume_folder) / AUXILIARY_FILE)
            self._resume_folder = None

    def _load_auxiliary(self, path: Path) -> None:
        auxiliary = self.auxiliary_state()
        if not auxiliary:
            return
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

    def _load_average(self, folder: str) -> None:
        if self.average is not None:
            load_model(self.average, Path(folder) / AVERAGE_FILE)

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

    def loss_and_predictions(self, rows, ignore_keys, metric_key_prefix: str) -> dict[str, float]:
        """For trainers with an evaluation of their own: the loss and the user's metrics, where somebody asks for them.

        `compute_metrics` does, and `metric_for_best_model`, which is the loss by default.
        """
        best = str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.compute_metrics is None and best != "loss":
            return {}
        loader = self.get_eval_dataloader(rows)
        loss_only = self.compute_metrics is None
        return super().evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix).metrics

    def evaluate(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints
    def checkpoint_files(self) -> tuple[str, ...]:
        """Files that a checkpoint of this run must hold beside weights, optimizer, scheduler and state."""
        average = average_files(self.args)
        return (*average, AUXILIARY_FILE) if self.auxiliary_state() else average

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # What cannot be used is not saved, as a checkpoint or as the result.
        self.check_finite()
        if not _internal_call:
            return super().save_model(output_dir)
        self._check_grad_norm()
        with self._own_key_names():
            super().save_model(output_dir, _internal_call=True)

    @contextmanager
    def _own_key_names(self) -> Iterator[None]:
        """`save_pretrained` with the names of the model's own parameters, which is what resuming reads.

        By default it writes those of the architecture's original release, and none of them would be found again.
        """
        model = self.unwrapped_model
        if not isinstance(model, PreTrainedModel):
            yield
            return
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            yield
        finally:
            del model.save_pretrained

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with own_settings(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resume_folder = resume_from_checkpoint

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.unwrapped_model
        tensors = model.state_dict(keep_vars=True)
        missing = set(load_result.missing_keys)
        # A tied parameter is stored once, under one of its names; a frozen base is where its reference says.
        found = {id(tensor) for name, tensor in tensors.items() if name not in missing}
        if hasattr(getattr(model, "config", None), "base_model_name_or_path"):
            found |= {
                id(tensor) for name, tensor in tensors.items() if name.startswith("base.") and not tensor.requires_grad
            }
        lost = [name for name in load_result.missing_keys if name in tensors and id(tensors[name]) not in found]
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} of the model's {len(tensors)} tensors ({', '.join(lost[:3])}, ...); "
                "training from it would start them anew. Resume with the model it was saved from."
            )
        load_result.missing_keys[:] = []
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(str(self.state.best_model_checkpoint))


def _default(cls: type, name: str) -> Any:
    item = next(item for item in fields(cls) if item.name == name)
    return item.default if item.default_factory is MISSING else item.default_factory()


def average_files(args: CompressionTrainingArguments) -> tuple[str, ...]:
    """Names of the files of averaged weights in a checkpoint of a run with these arguments."""
    return (AVERAGE_FILE,) if args.ema_decay > 0 else ()


def _warmed_up(decay: float):
    """EMA whose decay is min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's moving averages."""

    @torch.no_grad()
    def update(averaged, current, num_averaged) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    return update
