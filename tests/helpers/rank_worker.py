"""Trains every trainer on one process, on two gloo ranks, and across both: `python -m tests.helpers.rank_worker FOLDER`.

FOLDER/RUN/TRAINER is the output folder of a run; `told.pt` in it holds the losses, every state after training, and how far
apart the states of the ranks are. Runs: `one` (one process), `two` (two ranks, the same global batch), `one_to_two` and
`two_to_one` (resumed on the other number of processes), `fsdp` (two ranks, sharded), `fsdp_again` (resumed from it).
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from tests.helpers import joint_lfq_run, pruning_run, tokcom_runs, vqgan_run
from tests.helpers.forks import start, wait
from tests.helpers.processes import ROOT
from tokcom_hf.cli import leave_together
from tokcom_hf.data import latent_rows

STEPS, SAVED = 4, 2
# What `accelerate launch --config_file` tells its processes.
FSDP2 = yaml.safe_load((ROOT / "recipes" / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
SHARDED = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in FSDP2.items()}


def quiet_vae(folder, **changes):
    """Without the VAE's own noise, which each process draws for itself."""
    return tokcom_runs.vae_trainer(folder, tokcom_runs.block_model().vae, **changes)


def quiet_vqgan(folder, quantizer="ema", **changes):
    """With the losses that are measured over the whole batch of all ranks."""
    model = {"quantizer": quantizer, "entropy_weight": 0.1, "dead_code_threshold": 0.5}
    return vqgan_run.trainer(folder, model, num_pictures=0, gan_loss="non_saturating", **changes)


# Trainer -> (rows of the global batch, how it is built).
TRAINERS = {
    "vae": (8, quiet_vae),
    "denoiser": (8, tokcom_runs.denoiser_trainer),
    "rows": (8, tokcom_runs.row_trainer),
    "distill": (8, tokcom_runs.distillation_trainer),
    "vqgan_ema": (8, quiet_vqgan),
    "vqgan_lfq": (8, partial(quiet_vqgan, quantizer="lfq")),
    "pruning": (4, partial(pruning_run.make_trainer, noise=False)),
    "lora": (4, partial(pruning_run.make_trainer, noise=False, lora_r=2)),
    "joint": (4, joint_lfq_run.make_trainer),
}
# Every rank evaluates all rows of joint training: its batches are those of one process.
EVALUATED = {"joint": 8}
FSDP_TRAINERS = ("denoiser", "pruning", "lora", "joint")


def states(trainer) -> dict[str, torch.Tensor]:
    """Every trained or counted number: model, average, second networks."""
    parts = {"model": trainer.unwrapped_model, "average": trainer.average}
    parts |= {name: item for name, item in trainer.auxiliary_state().items() if isinstance(item, torch.nn.Module)}
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def apart(tensors: dict[str, torch.Tensor]) -> float:
    """The largest difference between this rank's tensors and those of rank 0."""
    largest = torch.zeros(())
    for value in tensors.values():
        first = value.double()
        dist.broadcast(first, 0)
        largest = torch.maximum(largest, (value.double() - first).abs().max().float())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def train(work: Path, run: str, names, world: int, origin: str = "") -> None:
    """Trains the named trainers one after another, from the checkpoint of the run `origin` on where one is named."""
    if os.environ.get("RANK") == "1":
        # It writes its latents while the other rank begins to train in the same folder.
        reserve, latent_rows.reserve = latent_rows.reserve, lambda file: (time.sleep(1), reserve(file))
    for name in names:
        batch, build = TRAINERS[name]
        folder = work / run / name
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "logging_steps": 1,
            "eval_strategy": "steps", "eval_steps": STEPS, "ema_decay": 0.0 if name in FSDP_TRAINERS else 0.9,
            "per_device_train_batch_size": batch // world, "per_device_eval_batch_size": EVALUATED.get(name, 8 // world),
        }  # fmt: skip
        trainer = build(folder, **settings)
        if name in ("vae", "distill"):
            trainer.eval_dataset = tokcom_runs.Rows(8)  # whole batches on two ranks, too
        assert trainer.accelerator.num_processes == world, trainer.accelerator.num_processes
        trainer.train(resume_from_checkpoint=str(work / origin / name / f"checkpoint-{SAVED}") if origin else None)
        told = {"world": world, "losses": tokcom_runs.losses(trainer)[-STEPS:]}
        evaluations = [line for line in trainer.state.log_history if any(name.startswith("eval_") for name in line)]
        told["metrics"] = {name: value for line in evaluations for name, value in line.items()}
        if trainer.is_fsdp_enabled:
            told["class"] = type(trainer.model).__name__
        else:
            told |= {"states": states(trainer), "apart": apart(states(trainer)) if world > 1 else 0.0}
        trainer.save_model()
        if trainer.is_world_process_zero():
            torch.save(told, folder / "told.pt")
        trainer.accelerator.wait_for_everyone()
    del trainer
    leave_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    wait(*start(lambda rank: train(work, "one", TRAINERS, 1)))
    wait(*start(lambda rank: train(work, "two", TRAINERS, 2), 2))
    wait(*start(lambda rank: train(work, "one_to_two", TRAINERS, 2, "one"), 2))
    wait(*start(lambda rank: train(work, "two_to_one", TRAINERS, 1, "two")))
    wait(*start(lambda rank: train(work, "fsdp", FSDP_TRAINERS, 2), 2, **SHARDED))
    wait(*start(lambda rank: train(work, "fsdp_again", FSDP_TRAINERS, 2, "fsdp"), 2, **SHARDED))
