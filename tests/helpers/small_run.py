"""A recipe as small as one can be, run in forked children of one process that has imported everything once.

    python -m tests.helpers.small_run FOLDER JOBS.json      # prints a JSON list, one entry for each job

A job is a dictionary: `name` of its folder; `place` of that, FOLDER by default; `fault`, one of `FAULTS`, at the end of
step 3, or `fault_at_end`; `kill`, see `kill_at`; `resume`; `damage`, a file that is overwritten first; `before`, commands
that are called first. Its entry holds the exit code and what the child wrote to stderr.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.helpers.llama_rows import Rows
from tokcom_hf.endings import run_recipe
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.trainers.base import CompressionTrainer, CompressionTrainingArguments

STEPS = 6
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


class WithSecondNetwork(CompressionTrainer):
    """Trains a second network beside the model, with an optimizer of its own, as the adversarial trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = torch.nn.Linear(2, 2)
        self.second_optimizer = torch.optim.AdamW(self.second.parameters(), lr=1e-2)

    def auxiliary_state(self):
        return {"second": self.second, "second_optimizer": self.second_optimizer}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.second(torch.randn(3, 2)).square().mean().backward()
        self.second_optimizer.step()
        self.second_optimizer.zero_grad()
        return loss


def poison_weight(trainer) -> None:
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = float("nan")


def poison_moment(trainer) -> None:
    next(iter(trainer.optimizer.state.values()))["exp_avg_sq"][0] = float("inf")


def poison_average(trainer) -> None:
    next(trainer.average.parameters()).data[0] = float("nan")


def poison_second(trainer) -> None:
    trainer.second.weight.data[0] = float("-inf")


def poison_second_moment(trainer) -> None:
    next(iter(trainer.second_optimizer.state.values()))["exp_avg"][0] = float("nan")


def limit(trainer) -> None:
    """Files of at most 4 kB from now on; the system's way to say so is an error, not a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def remove_folder(trainer) -> None:
    shutil.rmtree(trainer.args.output_dir)


def replace_folder(trainer) -> None:
    shutil.rmtree(trainer.args.output_dir)
    os.makedirs(trainer.args.output_dir)


def put_file(trainer) -> None:
    (Path(trainer.args.output_dir) / "checkpoint-4").write_text("somebody's")


def fill_disk(trainer) -> None:
    """The folder is a file system of its own: what is left of it is taken."""
    with open(Path(trainer.args.output_dir).parent / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def make_read_only(trainer) -> None:
    libc, place = ctypes.CDLL(None, use_errno=True), str(Path(trainer.args.output_dir).parent)
    if libc.mount(None, place.encode(), None, 32 | 1, None):  # MS_REMOUNT | MS_RDONLY
        raise RuntimeError(os.strerror(ctypes.get_errno()))


FAULTS = {
    item.__name__: item
    for item in (
        poison_weight, poison_moment, poison_average, poison_second, poison_second_moment, limit, remove_folder,
        replace_folder, put_file, fill_disk, make_read_only,
    )
}  # fmt: skip


@dataclass
class At(TrainerCallback):
    """Does something to the trainer when a step is over."""

    trainer: Any
    step: int
    act: Any

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(self.trainer)


def kill_at(call: str, number: int) -> None:
    """Kills the process when it is about to call `os.fsync`, `os.rename` or `os.replace` for the `number`-th time."""
    original, count = getattr(os, call), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, call, counted)


def recipe(folder: Path, job: dict[str, Any]) -> None:
    run = RunFolder(RunFolderArguments(str(folder), resume=job.get("resume", False)), "small_run")
    torch.manual_seed(0)
    args = CompressionTrainingArguments(
        str(folder), max_steps=STEPS, save_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        ema_decay=0.5, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = WithSecondNetwork(LlamaForCausalLM(LlamaConfig(**SIZES)), args, train_dataset=Rows(SIZES["vocab_size"]))
    if job.get("fault"):
        trainer.add_callback(At(trainer, 3, FAULTS[job["fault"]]))
    run.start({"": {"training.seed": job.get("seed", 0)}})
    run.train(trainer)
    trainer.use_averaged_weights()
    if job.get("fault_at_end"):
        FAULTS[job["fault_at_end"]](trainer)
    trainer.save_model(str(folder))
    run.finish()


def child(folder: Path, job: dict[str, Any], told: Path) -> int:
    """Runs a job in a fork of this process and returns its exit code, -9 where it was killed."""
    process = os.fork()
    if process == 0:
        with open(told, "w") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if job.get("kill"):
            kill_at(*job["kill"])
        code = 3
        try:
            run_recipe(lambda: recipe(folder, job))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for number, job in enumerate(jobs):
        for command in job.get("before", ()):
            subprocess.run(command, check=True)
        if "damage" in job:
            (folder / job["name"] / job["damage"]).write_bytes(b"nothing")
        told = folder / f"stderr-{number}"
        code = child(Path(job.get("place", folder)) / job["name"], job, told)
        results.append({"code": code, "stderr": told.read_text()})
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
