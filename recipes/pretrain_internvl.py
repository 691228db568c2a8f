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

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import InternVLVisionConfig, Qwen2Config, set_seed

from tokcom_hf.cards import SCENES, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.captions import SceneArguments
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.scene_questions import SceneQuestionDataset
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.evaluation.vqa_generation import generate_answers
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.metrics.vqa import accuracy_by_type, vqa_accuracy
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.dense_pretraining import TowerLesson, earlier_accuracy, pretrain_tower
from tokcom_hf.small_models.small_internvl import build_small_internvl
from tokcom_hf.small_models.vlm_training import SmallVLMTrainer, SmallVLMTrainingArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.base import average_files

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "pretrain_internvl.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """Size and output of the run."""

    output_dir: str = field(default="outputs/small_internvl", metadata={"help": "Folder of model and processor."})
    tower_steps: int = field(default=300, metadata={"help": "Steps that teach tower and projector alone; 0: none."})
    questions_per_type: list[int] = field(
        default_factory=lambda: [3, 1, 1, 4, 1],
        metadata={"help": "Questions about each scene, at most, of each of --types."},
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


def main(argv: list[str] | None = None) -> dict:
    """Trains, saves and returns the results (empty on all ranks but the first)."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run, scenes = RunArguments(**values["run"]), SceneArguments(**values["scenes"])
    if len(run.questions_per_type) != len(scenes.types):
        raise RecipeError(f"--questions_per_type {run.questions_per_type} needs a number for each of {scenes.types}.")
    upload = take_upload(values["training"])
    folder = RunFolder(run, "pretrain_internvl", folders=("tower",))
    out = folder.path
    state = PartialState()
    use_all_cores(run.threads)
    set_seed(run.seed)
    started = time.time()
    model, processor = build_small_internvl(values["vision"], values["text"])
    state.print(f"{model.num_parameters():,} parameters", flush=True)
    values["training"].pop("resume_from_checkpoint", None)
    arguments = values["training"] | {"output_dir": str(out), "seed": run.seed}
    args = SmallVLMTrainingArguments(**arguments)
    train = SceneQuestionDataset(
        max(1, args.max_steps) * args.train_batch_size * args.gradient_accumulation_steps * state.num_processes,
        run.seed,
        scenes.image_size,
        dict(zip(scenes.types, run.questions_per_type)),
        **scenes.sampling(),
    )
    folder.start({"": settings_of(SECTIONS, values)})
    checkpoint = folder.checkpoint(average_files(args))
    seen = earlier_accuracy(out / "tower")
    if run.tower_steps and checkpoint is None:
        seen = teach_tower(model, processor, run, scenes, args, folder)
    # The tower can see by now, and training goes twice as fast without its backward pass.
    model.model.vision_tower.requires_grad_(run.tower_steps == 0)
    trainer = SmallVLMTrainer(model=model, args=args, train_dataset=train, data_collator=PackedVQACollator(processor))
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.unwrapped_model.requires_grad_(True)
    trainer.save_model(str(out))
    if not trainer.is_world_process_zero():
        return {}
    with folder.whole() as place:
        processor.save_pretrained(place)
    held_out = scene_rows(run.eval_questions, run.seed + 1_000_003, scenes)
    answers = generate_answers(trainer.unwrapped_model, VQACollator(processor, answers=False), held_out)
    scores = vqa_accuracy(answers, [row["answers"][0] for row in held_out])
    accuracy = accuracy_by_type(scores, [row["types"][0] for row in held_out])
    results = {"accuracy": accuracy, "scenes": vars(scenes), "seed": run.seed, "tower": seen}
    results["steps"] = trainer.state.global_step
    # Of a resumed run the training of all its parts, too.
    results["seconds"] = round(max(time.time() - started, trainer.training_seconds), 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_model_card(
        out,
        "small_vlm",
        tags=["vision-language"],
        pipeline_tag="image-text-to-text",
        repo_id=None if upload is None else upload.repo_id,
        dataset=SCENES,
        language="en",
        measured={"accuracy": accuracy},
        name="InternVL",
        parameters=trainer.unwrapped_model.num_parameters(),
        results=results,
    )
    print(f"held-out accuracy on {len(held_out)} questions, {results['seconds']:.0f} s")
    for kind, value in accuracy.items():
        print(f"  {kind:10s} {100 * value:5.1f} %")
    folder.finish()
    if upload is not None:
        print("pushed to", upload.push(out))
    return results


def teach_tower(
    model, processor, run: RunArguments, scenes: SceneArguments, args, folder: RunFolder
) -> dict[str, float]:
    """Tower and projector alone; returns what a linear probe then reads from features of held-out scenes."""
    inner = model.model
    seen = pretrain_tower(
        inner.vision_tower,
        lambda pixels: inner.get_image_features(pixel_values=pixels).pooler_output,
        processor.image_processor,
        TowerLesson(
            scenes.image_size,
            math.isqrt(processor.image_seq_length),
            run.tower_steps,
            seed=run.seed,
            scenes=scenes.sampling(),
        ),
        Path(args.output_dir) / "tower",
        extra_modules=(inner.multi_modal_projector,),
        resume=folder.resumes,
        trainer_arguments={"use_cpu": args.use_cpu, "disable_tqdm": args.disable_tqdm, "report_to": "none"},
    )
    PartialState().print("tower: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in seen.items()))
    return seen


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_recipe(main)
