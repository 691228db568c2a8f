"""Trains a small InternVL from scratch on procedural scenes, for machines where none can be downloaded.

    accelerate launch recipes/pretrain_internvl.py
    accelerate launch recipes/pretrain_internvl.py --max_steps 200 --output_dir outputs/quick_internvl
    accelerate launch recipes/pretrain_internvl.py --resume_from_checkpoint true

First the vision tower and the projector learn what every cell of a scene shows
(`tokcom_hf.small_models.dense_pretraining`), then the language model learns to answer, many questions per image in one
sequence.

Leaves a folder in the format of `OpenGVLab/InternVL3-1B-hf`: model, tokenizer, image processor, model card and
`results.json` with the held-out accuracy. `recipes/train_joint_lfq.py` takes that folder, or a real checkpoint, as `--base`.
"""

import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import InternVLVisionConfig, Qwen2Config, set_seed

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.scene_rows import SceneArguments, scene_rows
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.dense_pretraining import TowerLesson
from tokcom_hf.small_models.small_internvl import build_small_internvl
from tokcom_hf.small_models.vlm_recipe import (
    answer_accuracy,
    check_extent,
    teach_tower,
    train_small_vlm,
    training_scenes,
    write_report,
)
from tokcom_hf.small_models.vlm_training import SmallVLMTrainer, SmallVLMTrainingArguments
from tokcom_hf.threads import use_all_cores

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "pretrain_internvl.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """Size and output of the run."""

    output_dir: str = field(default="outputs/small_internvl", metadata={"help": "Folder of model and processor."})
    tower_steps: int = field(default=300, metadata={"help": "Steps that teach tower and projector alone; 0: none."})
    questions_per_type: list[int] = field(
        default_factory=lambda: [3, 1, 1, 4, 1],
        metadata={"help": "Questions per scene, at most: one number for each type in --types."},
    )
    eval_questions: int = field(default=500, metadata={"help": "Held-out questions with balanced answers."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a single process; all by default."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and training."})


SECTIONS = {
    "run": RunArguments,
    "scenes": SceneArguments,
    "vision": InternVLVisionConfig,
    "text": Qwen2Config,
    "training": SmallVLMTrainingArguments,
}


def read_arguments(argv: list[str] | None):
    """Values of all sections, run arguments, the scenes, training arguments, and where the model is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run, scenes = RunArguments(**values["run"]), SceneArguments(**values["scenes"])
    check_extent(run, scenes.types)
    upload = take_upload(values["training"])
    values["training"].pop("resume_from_checkpoint", None)
    args = SmallVLMTrainingArguments(**values["training"] | {"output_dir": run.output_dir, "seed": run.seed})
    return values, run, scenes, args, upload


def build_data(questions: list[int], scenes: SceneArguments, args: SmallVLMTrainingArguments):
    """Training scenes, drawn when they are read, with at most `questions[i]` questions of the i-th type."""
    return training_scenes(args, scenes, questions)


def build_model(values):
    """An untrained InternVL and its processor."""
    model, processor = build_small_internvl(values["vision"], values["text"])
    PartialState().print(f"{model.num_parameters():,} parameters", flush=True)
    return model, processor


def teach(model, processor, run: RunArguments, scenes: SceneArguments, args, folder: RunFolder) -> dict[str, float]:
    """Trains tower and projector alone; returns the accuracy of a linear probe on features of held-out scenes."""
    inner, side = model.model, math.isqrt(processor.image_seq_length)
    features = lambda pixels: inner.get_image_features(pixel_values=pixels).pooler_output  # noqa: E731
    lesson = TowerLesson(scenes.image_size, side, run.tower_steps, seed=run.seed, scenes=scenes.sampling())
    return teach_tower(inner.vision_tower, features, processor, args, lesson, folder, (inner.multi_modal_projector,))


def build_trainer(model, processor, run: RunArguments, args: SmallVLMTrainingArguments, train) -> SmallVLMTrainer:
    """The trainer of projector and language model, and of the tower too if --tower_steps is 0."""
    # A pretrained tower stays frozen: training is twice as fast without its backward pass.
    model.model.vision_tower.requires_grad_(run.tower_steps == 0)
    return SmallVLMTrainer(model=model, args=args, train_dataset=train, data_collator=PackedVQACollator(processor))


def report(run: RunArguments, folder: RunFolder, trainer, processor, scenes, probe, started, upload) -> dict[str, Any]:
    """Measures accuracy by question type; writes results.json and the card; returns the results."""
    out, model = folder.path, trainer.unwrapped_model
    with folder.whole() as place:
        processor.save_pretrained(place)
    held_out = scene_rows(run.eval_questions, run.seed + 1_000_003, scenes)
    accuracy = answer_accuracy(model, processor, held_out)
    results: dict[str, Any] = {"accuracy": accuracy, "scenes": vars(scenes), "seed": run.seed, "tower": probe}
    results["steps"] = trainer.state.global_step
    # A resumed run also counts the training before its interruption.
    results["seconds"] = round(max(time.time() - started, trainer.training_seconds), 1)
    measured = {"accuracy": accuracy}
    write_report(out, "InternVL", model, results, measured, None if upload is None else upload.repo_id)
    print(f"held-out accuracy on {len(held_out)} questions, {results['seconds']:.0f} s")
    for kind, value in accuracy.items():
        print(f"  {kind:10s} {100 * value:5.1f} %")
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains the tower, then the rest; measures, saves and returns the results (empty on all ranks but the first)."""
    values, run, scenes, args, upload = read_arguments(argv)
    folder = RunFolder(run, "pretrain_internvl", folders=("tower",))
    use_all_cores(run.threads)
    set_seed(run.seed)
    started = time.time()
    train = build_data(run.questions_per_type, scenes, args)
    model, processor = build_model(values)
    teacher = partial(teach, model, processor, run, scenes, args, folder) if run.tower_steps else None
    builder = partial(build_trainer, model, processor, run, args, train)
    trainer, probe = train_small_vlm(folder, settings_of(SECTIONS, values), args, teacher, builder)
    if not trainer.is_world_process_zero():
        return {}
    results = report(run, folder, trainer, processor, scenes, probe, started, upload)
    folder.finish()
    if upload is not None:
        print("pushed to", upload.push(folder.path))
    return results


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_recipe(main)
