"""A tiny pruning run for the trainer's tests: `python -m tests.helpers.pruning_run OUTPUT [resume] [quiet] [--kill]`."""

import os
import sys
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, set_seed

from tokcom_hf import (
    LayerPrunerConfig,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMergerConfig,
    TokenPruningTrainer,
    TokenPruningTrainingArguments,
)
from tokcom_hf.cli import leave_together
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor

from .processes import Kill


def make_trainer(output, noise=True, **changes):
    torch.set_num_threads(1)
    set_seed(0)
    processor = scene_processor(32, 8)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    base = build_small_llava(vision, text | {"num_key_value_heads": 2}, processor)
    merger = TokenMergerConfig(
        feature_size=16, question_size=32, target_merge_tokens=10, internal_size=16, gumbel_noise=noise
    )
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 3], keep_tokens=[6, 3], internal_size=16, gumbel_noise=noise)
    arguments = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "remove_unused_columns": False,
        "merger_learning_rate": 1e-3,
        "pruner_learning_rate": 1e-3,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "discriminator_reinit_probability": 0.3,
    }
    args = TokenPruningTrainingArguments(**arguments | changes)
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16, dropout=0.0))
    return TokenPruningTrainer(
        model=PrunedVLM.from_base(base, merger, pruner),
        args=args,
        train_dataset=scene_rows(48, 0, image_size=32),
        eval_dataset=scene_rows(10, 1, image_size=32),
        data_collator=VQACollator(processor),
        generation_collator=VQACollator(processor, answers=False),
        discriminator=critic if args.adversarial_weight > 0 else None,
    )


def fingerprint(trainer) -> dict[str, torch.Tensor]:
    """Every trained number: heads, adapters, discriminator."""
    model, critic = trainer.unwrapped_model, trainer.accelerator.unwrap_model(trainer.discriminator)
    parts = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return parts | {f"critic.{n}": p.detach().clone() for n, p in critic.named_parameters()}


if __name__ == "__main__":
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(sys.argv[1], "quiet" not in sys.argv, per_device_train_batch_size=4 // ranks)
    if "--kill" in sys.argv:
        trainer.add_callback(Kill(5))
    trainer.train(resume_from_checkpoint="resume" in sys.argv or None)
    if trainer.is_world_process_zero():
        world = trainer.args.world_size
        torch.save({"world": world, "weights": fingerprint(trainer)}, Path(sys.argv[1]) / "end.pt")
    del trainer
    leave_together()
