"""Trains a small LLaVA from scratch on procedural VQA scenes, for machines where no VLM can be downloaded.

    accelerate launch recipes/pretrain_vlm.py
    accelerate launch recipes/pretrain_vlm.py --max_steps 200 --output_dir outputs/quick_vlm
    accelerate launch recipes/pretrain_vlm.py --resume_from_checkpoint true

First the vision tower learns what every patch shows (`tokcom_hf.small_models.dense_pretraining`), then the language model
learns to answer, many questions per image in one sequence.

Leaves a folder in the format of `llava-hf/llava-1.5-7b-hf`: model, processor, model card and `results.json`. The other
pruning recipes take that folder, or the name of a real checkpoint, as `--base_model`.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import CLIPVisionConfig, LlamaConfig, set_seed

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.scene_rows import SceneArguments, scene_rows
from tokcom_hf.data.scenes import COLOURS, QUESTION_TYPES, SHAPES
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.dense_pretraining import TowerLesson
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor
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

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "pretrain_vlm.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """Data and output of the run."""

    output_dir: str = field(default="outputs/small_vlm", metadata={"help": "Folder of model and processor."})
    tower_steps: int = field(default=300, metadata={"help": "Steps that teach the vision tower alone; 0 for none."})
    train_tower: bool = field(default=False, metadata={"help": "Train the tower together with the language model."})
    questions_per_type: list[int] = field(
        default_factory=lambda: [3, 1, 1, 4, 1],
        metadata={"help": f"Questions per scene, at most: one number for each of {', '.join(QUESTION_TYPES)}."},
    )
    captions: bool = field(default=False, metadata={"help": "Also train to caption every scene."})
    eval_questions: int = field(default=1000, metadata={"help": "Held-out questions with balanced answers."})
    num_shapes: int = field(default=len(SHAPES), metadata={"help": "Different shapes in the scenes."})
    num_colours: int = field(default=len(COLOURS), metadata={"help": "Different colours in the scenes."})
    min_objects: int = field(default=2, metadata={"help": "Fewest objects of a scene."})
    max_objects: int = field(default=6, metadata={"help": "Most objects of a scene."})
    grid: int = field(default=4, metadata={"help": "Cells per side of a scene."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a single process; all by default."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and training."})

    def scenes(self, image_size: int) -> SceneArguments:
        """The scenes of these arguments, with `image_size` pixels per side."""
        names = ("num_shapes", "num_colours", "min_objects", "max_objects", "grid")
        return SceneArguments(image_size, **{name: getattr(self, name) for name in names})


SECTIONS = {
    "run": RunArguments,
    "vision": CLIPVisionConfig,
    "text": LlamaConfig,
    "training": SmallVLMTrainingArguments,
}


def read_arguments(argv: list[str] | None):
    """Values of all sections, run arguments, the scenes, training arguments, and where the model is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run = RunArguments(**values["run"])
    check_extent(run, QUESTION_TYPES)
    scenes = run.scenes(CLIPVisionConfig(**values["vision"]).image_size)
    upload = take_upload(values["training"])
    values["training"].pop("resume_from_checkpoint", None)
    args = SmallVLMTrainingArguments(**values["training"] | {"output_dir": run.output_dir, "seed": run.seed})
    return values, run, scenes, args, upload


def build_data(run: RunArguments, scenes: SceneArguments, args: SmallVLMTrainingArguments):
    """Training scenes, drawn when they are read."""
    return training_scenes(args, scenes, run.questions_per_type, run.captions)


def build_model(values):
    """An untrained LLaVA and its processor."""
    vision = CLIPVisionConfig(**values["vision"])
    processor = scene_processor(vision.image_size, vision.patch_size)
    model = build_small_llava(vision, values["text"], processor)
    PartialState().print(f"{model.num_parameters():,} parameters", flush=True)
    return model, processor


def teach(model, processor, run: RunArguments, scenes: SceneArguments, args, folder: RunFolder) -> dict[str, float]:
    """Trains the tower alone, patch by patch; returns the accuracy of a linear probe on held-out patches."""
    tower, vision = model.model.vision_tower, model.config.vision_config
    side = vision.image_size // vision.patch_size
    lesson = TowerLesson(scenes.image_size, side, run.tower_steps, seed=run.seed, scenes=scenes.sampling())
    return teach_tower(tower, lambda pixels: tower(pixels).last_hidden_state[:, 1:], processor, args, lesson, folder)


def build_trainer(model, processor, run: RunArguments, args: SmallVLMTrainingArguments, train) -> SmallVLMTrainer:
    """The trainer of the language model and, with --train_tower, of the tower."""
    tower = model.model.vision_tower.requires_grad_(run.train_tower)
    if run.train_tower:
        # LLaVA reads the tower's features before its last norm, which therefore gets no gradient.
        tower.post_layernorm.requires_grad_(False)
    return SmallVLMTrainer(model=model, args=args, train_dataset=train, data_collator=PackedVQACollator(processor))


def report(run: RunArguments, folder: RunFolder, trainer, processor, scenes, probe, started, upload) -> None:
    """Measures accuracy by question type, with the right and with a wrong picture; writes results.json and the card."""
    out, model = folder.path, trainer.unwrapped_model.requires_grad_(True)
    with folder.whole() as place:
        processor.save_pretrained(place)
    # A resumed run also counts the training before its interruption.
    started = min(started, time.time() - trainer.training_seconds)
    held_out = scene_rows(run.eval_questions, run.seed + 1_000_003, scenes)
    rows = [held_out[i] for i in range(len(held_out))]
    # Each question with the picture of another question of its type, to measure what the words alone tell.
    step = len(QUESTION_TYPES)
    blind = [row | {"image": rows[(i + step) % len(rows)]["image"]} for i, row in enumerate(rows)]
    accuracy = {
        "accuracy": answer_accuracy(model, processor, rows),
        "accuracy_other_picture": answer_accuracy(model, processor, blind),
    }
    scene_settings = {name: value for name, value in vars(scenes).items() if name != "types"}
    results: dict[str, Any] = accuracy | {"tower": probe, "scenes": scene_settings, "seed": run.seed}
    results["seconds"] = round(time.time() - started, 1)
    write_report(out, "LLaVA", model, results, accuracy, None if upload is None else upload.repo_id)
    print(f"held-out accuracy on {len(rows)} questions, {results['seconds']:.0f} s")
    print(f"  {'':10s} {'':>7s} with another question's picture")
    for kind, value in accuracy["accuracy"].items():
        print(f"  {kind:10s} {100 * value:5.1f} % {100 * accuracy['accuracy_other_picture'][kind]:5.1f} %")


def main(argv: list[str] | None = None) -> None:
    """Trains the tower, then the whole model; measures and saves."""
    values, run, scenes, args, upload = read_arguments(argv)
    folder = RunFolder(run, "pretrain_vlm", folders=("tower",))
    use_all_cores(run.threads)
    set_seed(run.seed)
    started = time.time()
    train = build_data(run, scenes, args)
    model, processor = build_model(values)
    teacher = partial(teach, model, processor, run, scenes, args, folder) if run.tower_steps else None
    builder = partial(build_trainer, model, processor, run, args, train)
    trainer, probe = train_small_vlm(folder, settings_of(SECTIONS, values), args, teacher, builder)
    if trainer.is_world_process_zero():
        report(run, folder, trainer, processor, scenes, probe, started, upload)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(folder.path))


if __name__ == "__main__":
    run_recipe(main)
