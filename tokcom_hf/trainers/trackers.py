"""Logs of a run: names in the trackers, tables of samples, `logs/training.log`, `best.json`.

transformers' own callbacks (TensorBoard, wandb, Trackio, Comet, ...) do the tracking; this file adds what they do not do.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..whole_files import told_faults, write_text

LOG_FILE = "logs/training.log"
TENSORBOARD_FOLDER = "logs/tensorboard"
BEST_FILE = "best.json"


class TrackerName(str):
    """A name that reaches the trackers unchanged, for example `vae/batch_loss`.

    transformers' integrations write `"train/" + name` for every name but those of evaluations. Python asks the
    right-hand operand first if its class is a subclass of the other's, and this class answers with the name alone.
    """

    __slots__ = ()

    def __radd__(self, prefix: str) -> str:
        return str(self)


def tracker_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """`logs` with every name that holds a slash as a `TrackerName`."""
    return {TrackerName(name) if "/" in name else name: value for name, value in logs.items()}


class ScalarMeans:
    """Collects values of batches until the next line of the log takes their means."""

    def __init__(self):
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Adds the value of a batch, a scalar, under its name in the log."""
        self._values[name].append(torch.as_tensor(value).detach().float())

    def means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        self._values.clear()
        return means


class ProjectWandbCallback(WandbCallback):
    """`WandbCallback` that takes the project from `args.wandb_project`; the original reads only the environment."""

    def setup(self, args, state, model, **kwargs):
        project = getattr(args, "wandb_project", None)
        with patch_environment(WANDB_PROJECT=project) if project else nullcontext():
            super().setup(args, state, model, **kwargs)


def configure_trackers(trainer: Any) -> None:
    """Gives the trainer's wandb callback its project, and its TensorBoard callback a folder inside the run's."""
    callbacks = trainer.callback_handler.callbacks
    for position, callback in enumerate(callbacks):
        # A subclass that the caller gave stays as it is.
        if type(callback) is WandbCallback:
            callbacks[position] = ProjectWandbCallback()
        elif type(callback) is TensorBoardCallback and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir) / TENSORBOARD_FOLDER)


def log_table(trainer: Any, name: str, table: Mapping[str, Sequence[Any]]) -> None:
    """Sends a table to the trackers in use: `wandb.Table` under `name`, Markdown in TensorBoard's texts.

    Args:
        trainer: the trainer whose callbacks and step are used; only the first rank sends.
        name: name in the trackers, for example `vae/reconstructions`.
        table: column -> cells; all columns have one length.
    """
    if not trainer.is_world_process_zero():
        return
    step, rows = trainer.state.global_step, [list(row) for row in zip(*table.values(), strict=True)]
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            lines = ["| " + " | ".join(table) + " |", "|" + "---|" * len(table)]
            lines += ["| " + " | ".join(" ".join(str(cell).split()) for cell in row) + " |" for row in rows]
            writer.add_text(name, "\n".join(lines), step)
        wandb = getattr(callback, "_wandb", None)
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.log({name: wandb.Table(columns=list(table), data=rows), "train/global_step": step})


class TrainingLog(TrainerCallback):
    """Writes each log of a run as a line of `<output_dir>/logs/training.log`; a resumed run appends to the same file."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / LOG_FILE
        self._writes = False

    def write(self, text: str) -> None:
        """Appends a line with the time; does nothing outside training, and on all ranks but the first."""
        if self._writes:
            # The folder of the run is not created here: if it is gone, the run must end.
            with told_faults(self.path):
                self.path.parent.mkdir(exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [INFO] {text}\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self._writes = state.is_world_process_zero
        self.write(f"training from step {state.global_step} to {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = ", ".join(
            f"{name}: {value:.6g}" if isinstance(value, (int, float)) else f"{name}: {value}"
            for name, value in (logs or {}).items()
        )
        self.write(f"[Step {state.global_step}] {values}")

    def on_save(self, args, state, control, **kwargs):
        self.write(f"saved checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.write(f"training ended at step {state.global_step}")
        self._writes = False


class BestModel(TrainerCallback):
    """Keeps `<output_dir>/best.json`: stage, epoch and step of the best evaluation so far, its metric and value.

    The metric is `metric_for_best_model`, by default the loss. `checkpoint` is the folder of that step, or None if none was
    saved or `save_total_limit` has removed it.
    """

    def __init__(self, output_dir: str | Path, stage: str):
        self.folder, self.stage = Path(output_dir), stage
        self.record: dict[str, Any] | None = None
        self._training = False

    def metric(self, args) -> str:
        """Name of the metric without `eval_`."""
        return str(args.metric_for_best_model or "loss").removeprefix("eval_")

    def value(self, args, metrics: Mapping[str, Any]) -> float | None:
        """The best value so far, that in `metrics` included; None if `metrics` lack it or no training is running."""
        value = metrics.get(f"eval_{self.metric(args)}")
        if not self._training or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value) if self.record is None or self._is_better(args, value) else self.record["value"]

    def logged(self, args, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The best value so far under its name in the log; empty if `value` is None."""
        best = self.value(args, metrics)
        return {} if best is None else {f"eval_best_{self.metric(args)}": best}

    def _is_better(self, args, value: float) -> bool:
        if self.record is None or self.record["metric"] != self.metric(args):
            return True
        greater = args.greater_is_better
        greater = not self.metric(args).endswith("loss") if greater is None else greater
        return value > self.record["value"] if greater else value < self.record["value"]

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self.record = True, None
        if state.global_step and (self.folder / BEST_FILE).is_file():
            record = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))
            # An evaluation after the step of the resumed checkpoint does not belong to this run.
            self.record = record if record["step"] <= state.global_step else None

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics = metrics or {}
        value = self.value(args, metrics)
        if value is None or not self._is_better(args, metrics[f"eval_{self.metric(args)}"]):
            return
        self.record = {
            "stage": self.stage, "epoch": state.epoch, "step": state.global_step, "metric": self.metric(args),
            "value": value, "checkpoint": None,
        }  # fmt: skip
        self._write(state)

    def on_save(self, args, state, control, **kwargs):
        if self.record is not None:
            name = f"checkpoint-{self.record['step']}"
            saved = name if (self.folder / name).is_dir() else None
            if saved != self.record["checkpoint"]:
                self.record["checkpoint"] = saved
                self._write(state)

    def _write(self, state) -> None:
        if state.is_world_process_zero:
            write_text(self.folder / BEST_FILE, json.dumps(self.record, indent=2) + "\n")
