"""Trains every TokCom stage in processes of their own: `python -m tests.helpers.tokcom_worker FOLDER`.

FOLDER/whole: one process, undisturbed. FOLDER/two: two ranks with the same global batch. FOLDER/cut: killed in each stage,
and gone on with. All are forks of this process, which has loaded the packages once and computed nothing.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.helpers.tokcom_runs import STAGES, block_model, losses
from tokcom_hf.cli import leave_together
from tokcom_hf.trainers.base import last_complete_checkpoint


class Slow(TrainerCallback):
    """Leaves the killer time to strike between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.1)


def train(work: Path, world: int = 1, slow: str = "") -> None:
    """All stages, one after another, each from its newest checkpoint on."""
    changes = {
        "max_steps": 12, "per_device_train_batch_size": 8 // world, "ema_decay": 0.9, "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    for stage, build in STAGES.items():
        folder = work / stage
        # Both ranks encode into one file at once, which must not disturb either; the recipe lets the first do it for all.
        folder.mkdir(parents=True, exist_ok=True)
        # The noise of the VAE's stage is each rank's own; without it two ranks must be one process.
        model = block_model().vae if stage == "vae" else None
        trainer = build(folder, model, **changes)
        assert trainer.accelerator.num_processes == world, trainer.accelerator.num_processes
        if stage == slow:
            trainer.add_callback(Slow())
        trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)
        trainer.use_averaged_weights()
        trainer.save_model()
        if trainer.is_world_process_zero():
            told = {"world_size": trainer.accelerator.num_processes, "losses": losses(trainer)}
            (folder / "told.json").write_text(json.dumps(told))
        trainer.accelerator.wait_for_everyone()
    del trainer, model
    leave_together()


def fork(work: Path, rank: int = 0, world: int = 1, port: int = 0, slow: str = "") -> int:
    """Starts `train` in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        train(work, world, slow)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def wait(*processes: int) -> None:
    for process in processes:
        _, status = os.waitpid(process, 0)
        assert status == 0, f"process {process} ended with {status}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    wait(fork(work / "whole"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wait(*[fork(work / "two", rank, 2, port) for rank in range(2)])
    for stage in STAGES:
        # Finishes what was killed before, and is killed itself in its slow stage.
        process = fork(work / "cut", slow=stage)
        while last_complete_checkpoint(work / "cut" / stage) is None:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run ended before its first checkpoint"
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not (work / "cut" / stage / "model.safetensors").exists()
    wait(fork(work / "cut"))
