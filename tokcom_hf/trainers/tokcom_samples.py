"""Tables of samples during training: on the terminal, in `samples.jsonl`, and in the trackers in use.

A table is a dictionary, column -> texts; its name is the one that it has in the trackers, for example `vae/reconstructions`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .trackers import log_table


class SampleTableCallback(TrainerCallback):
    """Every `args.sample_every` epochs asks the trainer for `sample_tables(decode_text)` and shows them."""

    def __init__(self, trainer: Any, width: int = 120):
        self.trainer, self.width = trainer, width
        self._next: float | None = None

    def on_epoch_end(self, args, state, control, **kwargs):
        self._maybe_show(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # Fractions of an epoch come due inside it; whole ones are left to on_epoch_end.
        if args.sample_every < 1:
            self._maybe_show(args, state)

    def _maybe_show(self, args, state) -> None:
        if self._next is None:
            self._next = args.sample_every * (1 + int((state.epoch - 1e-6) / args.sample_every))
        if state.epoch + 1e-6 < self._next or not state.is_world_process_zero or self.trainer.eval_dataset is None:
            return
        self._next += args.sample_every
        trainer = self.trainer
        tokenizer = trainer.processing_class

        def decode_text(ids: torch.Tensor) -> list[str]:
            if tokenizer is None:
                return [" ".join(map(str, row)) for row in ids.tolist()]
            return tokenizer.batch_decode(ids)

        model = trainer.unwrapped_model
        training = model.training
        model.eval()
        # A table must not move the random state of the run it shows.
        with torch.random.fork_rng(), trainer.averaged_weights():
            tables = trainer.sample_tables(decode_text)
        model.train(training)
        for name, table in tables.items():
            line = {"step": state.global_step, "epoch": state.epoch, "table": name, **table}
            with (Path(args.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._print(name, table, state)
            log_table(trainer, name, table)

    def _print(self, name: str, table: dict[str, list[str]], state) -> None:
        lines = [f"{name} at step {state.global_step} (epoch {state.epoch:.2f})"]
        for row in zip(*table.values()):
            for column, text in zip(table, row):
                text = " ".join(text.split())
                lines.append(f"  {column:>20}: {text[: self.width]}{'…' if len(text) > self.width else ''}")
            lines.append("")
        # A terminal that knows few characters must not end the training.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print("\n" + "\n".join(lines).encode(encoding, "replace").decode(encoding), flush=True)
