"""What the recipes of the small VLMs share: scenes to train on, a tower that learns to see first, accuracy, the report."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..cards import SCENES, write_model_card
from ..data.scene_questions import SceneQuestionDataset
from ..data.scene_rows import SceneArguments
from ..data.vqa_collator import VQACollator
from ..evaluation.vqa_generation import generate_answers
from ..metrics.vqa import accuracy_by_type, vqa_accuracy
from ..run_folders import RunFolder
from ..trainers.base import average_files
from .dense_pretraining import TowerLesson, earlier_accuracy, pretrain_tower
from .vlm_training import SmallVLMTrainer, SmallVLMTrainingArguments


def training_scenes(
    args: SmallVLMTrainingArguments, scenes: SceneArguments, questions: Sequence[int], captions: bool = False
) -> SceneQuestionDataset:
    """Fresh scenes for every step of a run of `args.max_steps`.

    Args:
        scenes: which ones are drawn.
        questions: how many are asked about each scene, at most, of each of `scenes.types`.
        captions: ask for a caption of each scene, too.
    """
    per_step = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    per_type = dict(zip(scenes.types, questions, strict=True))
    count = max(1, args.max_steps) * per_step
    return SceneQuestionDataset(count, args.seed, scenes.image_size, per_type, captions, **scenes.sampling())


def teach_tower(
    tower: nn.Module,
    features: Callable[[torch.Tensor], torch.Tensor],
    processor: Any,
    args: SmallVLMTrainingArguments,
    lesson: TowerLesson,
    folder: RunFolder,
    extra_modules: Sequence[nn.Module] = (),
) -> dict[str, float]:
    """Trains a vision tower patch by patch; prints and returns what a linear probe then reads from held-out patches.

    Args:
        tower: module whose parameters learn, and with it `extra_modules`, which `features` passes through, too.
        features: pixel values -> features `(batch, side², size)`, one per patch in reading order.
        processor: of the VLM.
        args: of the training that follows.
        lesson: what is taught, and for how long.
        folder: of the run; its subfolder `tower` takes the results.
    """
    seen = pretrain_tower(
        tower,
        features,
        processor.image_processor,
        lesson,
        folder.path / "tower",
        extra_modules=extra_modules,
        resume=folder.resumes,
        trainer_arguments={"use_cpu": args.use_cpu, "disable_tqdm": args.disable_tqdm, "report_to": "none"},
    )
    PartialState().print("tower: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in seen.items()))
    return seen


def train_small_vlm(
    folder: RunFolder,
    settings: dict[str, Any],
    args: SmallVLMTrainingArguments,
    teach: Callable[[], dict[str, float]] | None,
    build_trainer: Callable[[], SmallVLMTrainer],
) -> tuple[SmallVLMTrainer, dict[str, float]]:
    """Teaches the tower, unless the run goes on from a checkpoint, then trains the whole and saves it.

    Args:
        folder: of the run, checked.
        settings: what decides the run's result (`fingerprints.settings_of`).
        args: of the training.
        teach: trains the tower and returns what a probe reads of it; None for a tower that is taught nothing.
        build_trainer: builds the trainer, when the tower is taught.

    Returns:
        the trainer after training, and what `teach` returned, in this run or in the one that it goes on with.
    """
    folder.start({"": settings})
    checkpoint = folder.checkpoint(average_files(args))
    seen = earlier_accuracy(folder.path / "tower")
    if teach is not None and checkpoint is None:
        seen = teach()
    trainer = build_trainer()
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.unwrapped_model.requires_grad_(True)
    trainer.save_model(str(folder.path))
    return trainer, seen


def answer_accuracy(model: Any, processor: Any, rows: Any) -> dict[str, float]:
    """Accuracy of a VLM's greedy answers to the first question of each row, by question type and over "all"."""
    answers = generate_answers(model, VQACollator(processor, answers=False), rows)
    scores = vqa_accuracy(answers, [row["answers"][0] for row in rows])
    return accuracy_by_type(scores, [row["types"][0] for row in rows])


def write_report(
    folder: Path, name: str, model: Any, results: dict[str, Any], measured: Mapping[str, Any], repo_id: str | None
) -> None:
    """Writes results.json and the model card of a small VLM into its folder.

    Args:
        name: of its architecture.
        results: of the run.
        measured: of these, what stands in the card's metadata.
        repo_id: `user/name` where the folder is going to be pushed.
    """
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_model_card(
        folder,
        "small_vlm",
        tags=["vision-language"],
        pipeline_tag="image-text-to-text",
        repo_id=repo_id,
        dataset=SCENES,
        measured=measured,
        name=name,
        parameters=model.num_parameters(),
        results=results,
    )
