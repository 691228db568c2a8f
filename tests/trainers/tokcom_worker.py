"""Trains one stage for 20 steps in a process of its own; started by test_tokcom_training."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from test_tokcom_training import SHAPE, denoiser_trainer, joint_model, vae_trainer

from tokcom_hf.cli import leave_together


class Slow(TrainerCallback):
    """Leaves the killer time to strike between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.1)


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("stage")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--world", type=int, default=1)
parser.add_argument("--save_steps", type=int, default=0)
parser.add_argument("--slow", action="store_true")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
torch.set_num_threads(1)
changes = {"max_steps": 20, "per_device_train_batch_size": options.batch, "ema_decay": 0.9}
if options.save_steps:
    changes |= {"save_strategy": "steps", "save_steps": options.save_steps}
# "embeddings": the denoiser's stage with token tables that train with it, and a reader of finished chunks.
networks = {"vae": (vae_trainer, None), "denoiser": (denoiser_trainer, None)}
if options.stage == "embeddings":
    reading = joint_model(
        token_time_std=1.0, scale_input=True, token_cut_rate=0.5, token_loss_max_time=0.5, token_window_size=24,
        noise_copies=2, token_attention_heads=2, token_mlp_size=48,
        denoiser=SHAPE | {"attention": "block_causal", "num_context_layers": 1},
    )  # fmt: skip
    networks["embeddings"] = (denoiser_trainer, reading)
build, network = networks[options.stage]
# Both ranks encode into one file at once, which must not disturb either; the recipe lets the first do it for all.
options.folder.mkdir(parents=True, exist_ok=True)
trainer = build(options.folder, network, **changes)
assert trainer.accelerator.num_processes == options.world, trainer.accelerator.num_processes
if options.slow:
    trainer.add_callback(Slow())
trainer.train(resume_from_checkpoint=True if options.resume else None)
trainer.use_averaged_weights()
trainer.save_model()
if trainer.is_world_process_zero():
    (options.folder / "world.json").write_text(json.dumps({"world_size": trainer.accelerator.num_processes}))
del trainer, network, build, networks
leave_together()
