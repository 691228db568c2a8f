"""Trains a small LLaVA from scratch on procedural VQA scenes, for machines where no VLM can be downloaded.

    accelerate launch recipes/pretrain_vlm.py
    accelerate launch recipes/pretrain_vlm.py --max_steps 200 --output_dir outputs/quick_vlm
    accelerate launch recipes/pretrain_vlm.py --resume_from_checkpoint true

First the vision tower learns what every patch shows (`tokcom_hf.small_models.dense_pretraining`), then the language model
learns to answer, many questions per image in one sequence.

Leaves a folder in the format of `llava-hf/llava-1.5-7b-hf`: model, processor, model card and `results.json`. The other
pruning recipes take that folder, or the name of a real checkpoint, as `--base_model`.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import CLIPVisionConfig, LlamaConfig, set_seed

from tokcom_hf.cards import SCENES, write_model_card
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.scene_questions import SceneQuestionDataset
from tokcom_hf.data.scenes import COLOURS, QUESTION_TYPES, SHAPES
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.evaluation.vqa_generation import generate_answers
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.metrics.vqa import accuracy_by_type, vqa_accuracy
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.dense_pretraining import TowerLesson, earlier_accuracy, pretrain_tower
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor
from tokcom_hf.small_models.vlm_training import SmallVLMTrainer, SmallVLMTrainingArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.base import average_files

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "pretrain_vlm.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """Data and output of the run."""

    output_dir: str = field(default="outputs/small_vlm", metadata={"help": "Folder of model and processor."})
    tower_steps: int = field(default=300, metadata={"help": "Steps that teach the vision tower alone; 0 for none."})
    train_tower: bool = field(default=False, metadata={"help": "Go on training the tower with the language model."})
    questions_per_type: list[int] = field(
        default_factory=lambda: [3, 1, 1, 4, 1],
        metadata={"help": f"Questions about each scene, at most, of type {', '.join(QUESTION_TYPES)}."},
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

    def __post_init__(self):
        if len(self.questions_per_type) != len(QUESTION_TYPES):
            raise ValueError(f"questions_per_type needs a number for each of {QUESTION_TYPES}.")

    def sampling(self) -> dict:
        """Options of `sample_scene`."""
        return {
            "min_objects": self.min_objects,
            "max_objects": self.max_objects,
            "grid": self.grid,
            "shapes": SHAPES[: self.num_shapes],
            "colours": tuple(COLOURS)[: self.num_colours],
        }


SECTIONS = {
    "run": RunArguments,
    "vision": CLIPVisionConfig,
    "text": LlamaConfig,
    "training": SmallVLMTrainingArguments,
}


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    upload = take_upload(values["training"])
    folder = RunFolder(run, "pretrain_vlm", folders=("tower",))
    out = folder.path
    state = PartialState()
    use_all_cores(run.threads)
    set_seed(run.seed)
    started = time.time()
    vision = CLIPVisionConfig(**values["vision"])
    processor = scene_processor(vision.image_size, vision.patch_size)
    model = build_small_llava(vision, values["text"], processor)
    state.print(f"{model.num_parameters():,} parameters", flush=True)
    values["training"].pop("resume_from_checkpoint", None)
    arguments = values["training"] | {"output_dir": str(out), "seed": run.seed}
    args = SmallVLMTrainingArguments(**arguments)
    scenes_per_step = args.train_batch_size * args.gradient_accumulation_steps * state.num_processes
    train = SceneQuestionDataset(
        max(1, args.max_steps) * scenes_per_step,
        run.seed,
        vision.image_size,
        dict(zip(QUESTION_TYPES, run.questions_per_type)),
        run.captions,
        **run.sampling(),
    )
    folder.start({"": settings_of(SECTIONS, values)})
    checkpoint = folder.checkpoint(average_files(args))
    if run.tower_steps and checkpoint is None:
        seen = teach_tower(model, processor, run, args, folder)
    else:
        seen = earlier_accuracy(out / "tower")
    tower = model.model.vision_tower.requires_grad_(run.train_tower)
    if run.train_tower:
        # LLaVA reads the tower before its last norm, which hence never gets a gradient.
        tower.post_layernorm.requires_grad_(False)
    trainer = SmallVLMTrainer(model=model, args=args, train_dataset=train, data_collator=PackedVQACollator(processor))
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        with folder.whole() as place:
            processor.save_pretrained(place)
        # Of a resumed run the training of all its parts, too.
        started = min(started, time.time() - trainer.training_seconds)
        model, repo_id = trainer.unwrapped_model.requires_grad_(True), None if upload is None else upload.repo_id
        report(out, model, processor, run, vision.image_size, seen, started, repo_id)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(out))


def teach_tower(
    model, processor, run: RunArguments, args: SmallVLMTrainingArguments, folder: RunFolder
) -> dict[str, float]:
    """The tower alone, patch by patch; returns what a linear probe then reads from held-out patches."""
    tower, vision = model.model.vision_tower, model.config.vision_config
    seen = pretrain_tower(
        tower,
        lambda pixels: tower(pixels).last_hidden_state[:, 1:],
        processor.image_processor,
        TowerLesson(
            vision.image_size,
            vision.image_size // vision.patch_size,
            run.tower_steps,
            seed=run.seed,
            scenes=run.sampling(),
        ),
        Path(args.output_dir) / "tower",
        resume=folder.resumes,
        trainer_arguments={"use_cpu": args.use_cpu, "disable_tqdm": args.disable_tqdm, "report_to": "none"},
    )
    PartialState().print("tower: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in seen.items()))
    return seen


def report(
    out: Path, model, processor, run: RunArguments, image_size: int, seen: dict, started: float, repo_id: str | None
) -> None:
    """Accuracy by question type on held-out questions, with the picture and (language prior) on other pictures."""
    scenes = {name: getattr(run, name) for name in ("num_shapes", "num_colours", "min_objects", "max_objects", "grid")}
    scenes["image_size"] = image_size
    held_out = scene_rows(run.eval_questions, run.seed + 1_000_003, **scenes)
    rows = [held_out[i] for i in range(len(held_out))]
    # Each question with the picture of another question of its type: what the words alone are worth.
    step = len(QUESTION_TYPES)
    blind = [row | {"image": rows[(i + step) % len(rows)]["image"]} for i, row in enumerate(rows)]
    accuracy = {}
    for name, part in (("accuracy", rows), ("accuracy_other_picture", blind)):
        answers = generate_answers(model, VQACollator(processor, answers=False), part)
        scores = vqa_accuracy(answers, [row["answers"][0] for row in part])
        accuracy[name] = accuracy_by_type(scores, [row["types"][0] for row in part])
    results = accuracy | {"tower": seen, "scenes": scenes, "seed": run.seed}
    results["seconds"] = round(time.time() - started, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_model_card(
        out,
        "small_vlm",
        tags=["vision-language"],
        pipeline_tag="image-text-to-text",
        repo_id=repo_id,
        dataset=SCENES,
        language="en",
        measured=accuracy,
        name="LLaVA",
        parameters=model.num_parameters(),
        results=results,
    )
    print(f"held-out accuracy on {len(rows)} questions, {results['seconds']:.0f} s")
    print(f"  {'':10s} {'':>7s} with another question's picture")
    for kind, value in accuracy["accuracy"].items():
        print(f"  {kind:10s} {100 * value:5.1f} % {100 * accuracy['accuracy_other_picture'][kind]:5.1f} %")


if __name__ == "__main__":
    run_recipe(main)
