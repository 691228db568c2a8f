"""Trains a small LLaVA from scratch on procedural VQA scenes, for machines where no VLM can be downloaded.

    accelerate launch recipes/pretrain_vlm.py
    accelerate launch recipes/pretrain_vlm.py --max_steps 200 --output_dir outputs/quick_vlm
    accelerate launch recipes/pretrain_vlm.py --resume_from_checkpoint true

Leaves a folder in the format of `llava-hf/llava-1.5-7b-hf`: model, processor and `results.json`. The other pruning
recipes take that folder, or the name of a real checkpoint, as `--base_model`.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.scenes import COLOURS, SHAPES
from tokcom_hf.data.small_vlm import scene_processor
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.metrics.vqa import accuracy_by_type, vqa_accuracy
from tokcom_hf.trainers.base import (
    CompressionTrainer,
    CompressionTrainingArguments,
    check_output_dir,
    last_complete_checkpoint,
)
from tokcom_hf.trainers.vqa_generation import generate_answers

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "pretrain_vlm.yaml"


@dataclass
class RunArguments:
    """Data and output of the run."""

    output_dir: str = field(default="outputs/small_vlm", metadata={"help": "Folder of model and processor."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what the output folder holds."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'true' goes on from a checkpoint."})
    train_images: int = field(default=20000, metadata={"help": "Scenes to train on."})
    questions_per_image: int = field(default=5, metadata={"help": "Questions about each scene, in one sequence."})
    eval_questions: int = field(default=1000, metadata={"help": "Held-out questions with balanced answers."})
    num_shapes: int = field(default=len(SHAPES), metadata={"help": "Different shapes in the scenes."})
    num_colours: int = field(default=len(COLOURS), metadata={"help": "Different colours in the scenes."})
    min_objects: int = field(default=2, metadata={"help": "Fewest objects of a scene."})
    max_objects: int = field(default=6, metadata={"help": "Most objects of a scene."})
    grid: int = field(default=4, metadata={"help": "Cells per side of a scene."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and training."})


SECTIONS = {
    "run": RunArguments,
    "vision": CLIPVisionConfig,
    "text": LlamaConfig,
    "training": CompressionTrainingArguments,
}


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    resume = run.resume_from_checkpoint not in (None, "false")
    out = check_output_dir(run.output_dir, run.overwrite, resume)
    set_seed(run.seed)
    started = time.time()
    vision = CLIPVisionConfig(**values["vision"])
    scenes = {
        "image_size": vision.image_size,
        "num_shapes": run.num_shapes,
        "num_colours": run.num_colours,
        "min_objects": run.min_objects,
        "max_objects": run.max_objects,
        "grid": run.grid,
    }
    train = scene_rows(
        run.train_images, run.seed, questions_per_image=run.questions_per_image, captions=True, **scenes
    )
    held_out = scene_rows(run.eval_questions, run.seed + 1_000_003, **scenes)
    processor = scene_processor(vision.image_size, vision.patch_size)
    model = build_model(vision, values["text"], processor)
    print(f"{len(train):,} scenes, {sum(p.numel() for p in model.parameters()):,} parameters")

    arguments = values["training"] | {"output_dir": str(out), "seed": run.seed, "remove_unused_columns": False}
    trainer = CompressionTrainer(
        model=model,
        args=CompressionTrainingArguments(**arguments),
        train_dataset=train,
        data_collator=VQACollator(processor),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out) if resume else None)
    trainer.use_averaged_weights()
    trainer.save_model(str(out))
    if not trainer.is_world_process_zero():
        return
    processor.save_pretrained(out)
    answers = generate_answers(trainer.unwrapped_model, VQACollator(processor, answers=False), held_out)
    scores = vqa_accuracy(answers, [row["answers"][0] for row in held_out])
    accuracy = accuracy_by_type(scores, [row["types"][0] for row in held_out])
    results = {"accuracy": accuracy, "scenes": scenes, "seed": run.seed, "seconds": round(time.time() - started, 1)}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy on {len(held_out)} questions, {results['seconds']:.0f} s")
    for kind, value in accuracy.items():
        print(f"  {kind:10s} {100 * value:5.1f} %")


def build_model(vision: CLIPVisionConfig, text: dict, processor) -> LlavaForConditionalGeneration:
    """A LLaVA of the given shape whose vocabulary is the processor's."""
    tokenizer = processor.tokenizer
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text | special),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlavaForConditionalGeneration(config).to(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


if __name__ == "__main__":
    run_recipe(main)
