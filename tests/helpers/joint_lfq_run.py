"""A tiny joint LFQ run for the trainer's tests: `python -m tests.helpers.joint_lfq_run OUTPUT [--kill]`."""

import os
import sys
from pathlib import Path

import torch
from transformers import set_seed

from tokcom_hf import JointLFQTrainer, JointLFQTrainingArguments, LFQConfig, LFQExpandedModel, LFQQuantizer
from tokcom_hf.cli import leave_together
from tokcom_hf.data.captions import JointLFQCollator, scene_caption_rows
from tokcom_hf.data.vqa import VQACollator
from tokcom_hf.small_models.small_internvl import build_small_internvl
from tokcom_hf.trainers.lfq_joint_model import JointLFQModel

from .processes import Kill

VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
BITS = 6


def make_model(**quantizer):
    set_seed(0)
    base, processor = build_small_internvl(VISION, TEXT)
    config = {
        "input_size": 32, "llm_hidden_size": 32, "num_tokens": 4, "output_dim": BITS, "hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.2,
    }  # fmt: skip
    expanded = LFQExpandedModel.from_base(base, BITS, "mean", tokenizer=processor.tokenizer)
    return JointLFQModel(expanded, LFQQuantizer(LFQConfig(**config | quantizer))), processor


def make_trainer(output, **changes):
    torch.set_num_threads(1)
    model, processor = make_model()
    arguments = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "caption_drop": 0.5,
        "seed": 0,
    }
    return JointLFQTrainer(
        model,
        JointLFQTrainingArguments(**arguments | changes),
        train_dataset=scene_caption_rows(40, 0, 2, image_size=32),
        eval_dataset=scene_caption_rows(12, 1, 1, image_size=32),
        data_collator=JointLFQCollator(processor),
        generation_collator=VQACollator(processor, answers=False),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    """A copy of every number of the model."""
    return {name: value.detach().clone() for name, value in trainer.unwrapped_model.state_dict().items()}


if __name__ == "__main__":
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(sys.argv[1], per_device_train_batch_size=4 // ranks)
    if "--kill" in sys.argv:
        trainer.add_callback(Kill(5))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"world": trainer.args.world_size, "weights": weights(trainer)}, Path(sys.argv[1]) / "end.pt")
    del trainer
    leave_together()
