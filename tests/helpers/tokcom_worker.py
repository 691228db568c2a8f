"""Trains every TokCom stage in processes of their own: `python -m tests.helpers.tokcom_worker FOLDER`.

FOLDER/whole: undisturbed. FOLDER/cut: killed in each stage, and gone on with. Both are forks of this process, which has
loaded the packages once and computed nothing.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.helpers.forks import start, wait
from tests.helpers.tokcom_runs import STAGES, losses
from tokcom_hf.cli import leave_together
from tokcom_hf.trainers.base import last_complete_checkpoint


class Slow(TrainerCallback):
    """Leaves the killer time to strike between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.1)


def train(work: Path, slow: str = "") -> None:
    """All stages, one after another, each from its newest checkpoint on."""
    changes = {
        "max_steps": 12, "per_device_train_batch_size": 8, "ema_decay": 0.9, "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    for stage, build in STAGES.items():
        folder = work / stage
        folder.mkdir(parents=True, exist_ok=True)
        trainer = build(folder, **changes)
        if stage == slow:
            trainer.add_callback(Slow())
        trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)
        trainer.use_averaged_weights()
        trainer.save_model()
        if trainer.is_world_process_zero():
            told = {"world_size": trainer.accelerator.num_processes, "losses": losses(trainer)}
            (folder / "told.json").write_text(json.dumps(told))
        trainer.accelerator.wait_for_everyone()
    del trainer
    leave_together()


def alone(work: Path, slow: str = "") -> int:
    """Starts `train` in a process of its own; returns its id."""
    return start(lambda rank: train(work, slow=slow))[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    wait(alone(work / "whole"))
    for stage in STAGES:
        # Finishes what was killed before, and is killed itself in its slow stage.
        process = alone(work / "cut", slow=stage)
        while last_complete_checkpoint(work / "cut" / stage) is None:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run ended before its first checkpoint"
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not (work / "cut" / stage / "model.safetensors").exists()
    wait(alone(work / "cut"))
