"""What every trainer of the package adds to HF `Trainer`: averaged weights, stops at NaN and signals, complete checkpoints.

Everything else (Accelerate, resume, RNG, callbacks, trackers, Hub pushes) is `Trainer`'s own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer

from ..checkpoints import AUXILIARY_FILE, last_complete_checkpoint
from ..held_folder import HeldFolder
from ..run_folders import check_output_dir
from ..stopping import training_is_over
from ..whole_files import remove_unfinished
from . import averaging, checkpoint_loading
from .base_arguments import CompressionTrainingArguments, average_files, checked_arguments, with_batches
from .checkpoint_writing import CheckpointWriting, final_save, own_key_names
from .clock import Clock
from .finite_guard import FiniteGuard
from .muon import muon_optimizer
from .resumed_settings import join_resumed_state, own_settings
from .sharding import own_classes, prepare_sharding, register_methods, saved_weights, shard_on_cpu, whole_weights
from .stop_at_signal import StopAtSignal
from .trackers import BestModel, ScalarMeans, TrainingLog, configure_trackers, tracker_names

__all__ = [
    "CompressionTrainer", "CompressionTrainingArguments", "average_files", "check_output_dir", "last_complete_checkpoint",
]  # fmt: skip


class CompressionTrainer(Trainer):
    """Thin base of the package's trainers.

    Subclasses may override `auxiliary_state` (second networks, optimizers) and call `log_scalars` in `compute_loss`.

    Attributes:
        arguments_class: class of `args`; `args=None` builds one with its defaults.
        stage: name of this training in `best.json`.
        run_settings: settings that decide the run's result (`RunFolder.train` sets them); checkpoint manifests repeat them.
        data_columns: columns that the loss reads and the model's forward does not name, kept under Trainer's default
            `remove_unused_columns=True`; None: the collator reads whole rows, which turns that argument off.
        shards: whether steps and evaluations of this trainer work on a model sharded by FSDP2.
        step_methods: methods of the model, besides `forward`, that `compute_loss` calls before `forward`.
    """

    args: CompressionTrainingArguments
    arguments_class: type[CompressionTrainingArguments] = CompressionTrainingArguments
    stage: str = "training"
    data_columns: tuple[str, ...] | None = ()
    shards: bool = False
    step_methods: tuple[str, ...] = ()

    def __init__(self, model=None, args=None, *positional, **kwargs):
        args = self.checked_arguments(args)
        if self.data_columns is None:
            args.remove_unused_columns = False
        self._finite = FiniteGuard(self)
        self._writing: CheckpointWriting | None = None
        self._folder = HeldFolder()
        self.run_settings: Mapping[str, Any] | None = None
        super().__init__(model, args, *positional, **kwargs)
        prepare_sharding(self)
        configure_trackers(self)
        self.training_log = TrainingLog(self.args.output_dir)
        self.best_model = BestModel(self.args.output_dir, self.stage)
        self.average: AveragedModel | None = None
        self._resume_folder: str | None = None
        self._scalars = ScalarMeans()
        self._clock = Clock()
        self._stopper = StopAtSignal(self)
        own = [self._clock, self.training_log, self.best_model, averaging.AverageCallback(self)]
        patience = self.args.early_stopping_patience
        for callback in (*own, *([EarlyStoppingCallback(patience)] if patience else []), self._stopper):
            self.add_callback(callback)

    @classmethod
    def checked_arguments(cls, args: CompressionTrainingArguments | None) -> CompressionTrainingArguments:
        """`args`, or the defaults for None; raises TypeError for another class, which lacks this trainer's fields."""
        return checked_arguments(args, cls.arguments_class, cls.__name__)

    @property
    def training_seconds(self) -> float:
        """Seconds spent in `train`, including those before a resume."""
        return self._clock.seconds

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [*(self._signature_columns or ()), *(self.data_columns or ())]
        self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]  # Trainer's starts as None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    @property
    def unwrapped_model(self):
        """The model without its DDP or compile wrapper."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s; raises ValueError if it gives no batch, because Trainer would end without having trained."""
        return with_batches(super().get_train_dataloader(), self._train_batch_size, self.args.world_size)

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon_learning_rate > 0 and self.optimizer is None:
            self.optimizer = muon_optimizer(self.unwrapped_model, self.args)
        return super().create_optimizer(*args, **kwargs)

    def auxiliary_state(self) -> dict[str, Any]:
        """Objects with `state_dict`/`load_state_dict` that a checkpoint must hold beside the model's own state."""
        return {}

    def log_scalars(self, prefix: str, values: Mapping[str, torch.Tensor | float]) -> None:
        """Collects values of batches; the next line of the training log holds their means as `prefix/name`."""
        for name, value in values.items():
            self._scalars.add(f"{prefix}/{name}", value)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As `Trainer.train`, but it resumes only from whole checkpoints and ends only with finite weights.

        Raises:
            ValueError: there is no whole checkpoint to resume from.
            FloatingPointError: loss, gradient norm or weights became NaN or infinite.
            Stopped: a signal ended the run (`stop_on_signals`); its checkpoint has been written.
        """
        checkpoint = checkpoint_loading.chosen(self, resume_from_checkpoint)
        self._folder.hold(self.args.output_dir)
        # Another rank may still be writing files into the folder that training needs, such as latents.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        try:
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            training_is_over()
        self.check_finite(everywhere=True)
        return output

    def _run_epoch(self, *args, **kwargs):
        # A run resumed from its last checkpoint has nothing left to do; Trainer itself would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        # A resumed run first makes up an evaluation that was due, and early stopping may have ended training there.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._stopper.evaluate_or_stop(partial(super()._maybe_log_save_evaluate, *args, **kwargs))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(self._stopper.random_states(checkpoint))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.stop_on_nonfinite_loss and not torch.isfinite(loss):
            raise self.not_finite(f"The loss became {loss.item()}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.see_grad_norm(norm)
        return norm

    def not_finite(self, what: str, step: int | None = None) -> FloatingPointError:
        """The error that ends a run in which `what` became NaN or infinite at `step`, by default the current step."""
        return self._finite.error(what, step)

    def check_finite(self, everywhere: bool = False) -> None:
        """Checks everything that is saved: model, averaged weights, second networks, states of all optimizers.

        Args:
            everywhere: a fault that one rank finds ends all ranks; every rank must then call this.

        Raises:
            FloatingPointError: a tensor holds NaN or infinity; the error names it.
        """
        self._finite.check_weights(everywhere)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._folder.check()
        if "loss" in logs:
            logs |= self._scalars.means()
        named = tracker_names(logs) | self.best_model.logged(self.args, logs)
        super().log(named, start_time)
        # Trainer adds the epoch to what `evaluate` returns.
        logs.update({name: value for name, value in named.items() if name == "epoch"})

    def _start_auxiliary(self) -> None:
        register_methods(self.unwrapped_model, self.step_methods)
        join_resumed_state(self)
        if self.args.ema_decay > 0:
            self.average = averaging.averaged_model(self.unwrapped_model, self.args.ema_decay, self.args.ema_warmup)
        folder, self._resume_folder = self._resume_folder, None
        if folder is not None:
            averaging.load_average(self.average, folder)
            checkpoint_loading.load_auxiliary(self.auxiliary_state(), folder)
            self._stopper.make_up_evaluation(folder)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the model holds the averaged weights, if averaging is on; a sharded model is gathered."""
        model = self.unwrapped_model
        with whole_weights(model), averaging.averaged_weights(model, self.average):
            yield

    def use_averaged_weights(self) -> None:
        """Copies the averaged weights into the model for good; call it after training, before `save_model`."""
        if self.average is not None:
            averaging.copy_average(self.unwrapped_model, self.average)

    def evaluate(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

    def checkpoint_files(self) -> tuple[str, ...]:
        """Files that a checkpoint of this run must hold beside weights, optimizer, scheduler and state."""
        return (*average_files(self.args), *([AUXILIARY_FILE] if self.auxiliary_state() else []))

    def _save_checkpoint(self, model, trial) -> None:
        self._folder.check()
        # Weights that are not finite are saved neither as a checkpoint nor as the result.
        self.check_finite(everywhere=True)
        self._finite.check_grad_norm()
        self._writing = CheckpointWriting(self, super()._get_output_dir(trial))
        try:
            with self._writing as writing:
                super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(writing.place))
        writing.rotate()

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing.parent)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A checkpoint that is still being written is pushed later, by `_save_checkpoint`.
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s, without half-written files; raises FloatingPointError for NaN, `WriteError` for a disk's fault."""
        if self._writing is None:
            self._folder.check()
            # NaN that one rank finds in its shards must end all ranks.
            self.check_finite(everywhere=self.is_fsdp_enabled)
            with final_save(self, output_dir or self.args.output_dir) as folder, own_classes(self.unwrapped_model):
                super().save_model(folder, _internal_call=True)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            model = self.unwrapped_model
            with self._writing.noted(), own_key_names(model), own_classes(model):
                super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None and self.is_fsdp_enabled:
            state_dict = saved_weights(self.unwrapped_model, state_dict)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # A disk error is held back until all ranks can raise it: others may be waiting for this rank, here or afterwards.
        with nullcontext() if self._writing is None else self._writing.noted():
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                averaging.save_average(self.average, output_dir)
                checkpoint_loading.save_auxiliary(self.auxiliary_state(), output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with own_settings(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resume_folder = resume_from_checkpoint

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        checkpoint_loading.check_missing_keys(self.unwrapped_model, load_result.missing_keys)
        load_result.missing_keys[:] = []
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        checkpoint_loading.check_contents(str(self.state.best_model_checkpoint))
        super()._load_best_model()
        averaging.load_average(self.average, str(self.state.best_model_checkpoint))
