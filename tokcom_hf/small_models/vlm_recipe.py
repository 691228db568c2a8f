"""Shared parts of the small VLMs' recipes: training scenes, pretraining of the tower, training, accuracy, and the report."""

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
from ..run_arguments import require_positive
from ..run_folders import RunFolder
from ..trainers.base import average_files
from .dense_pretraining import TowerLesson, earlier_accuracy, pretrain_tower
from .vlm_training import SmallVLMTrainer, SmallVLMTrainingArguments


def check_extent(run: Any, types: Sequence[str]) -> None:
    """Checks the numbers of questions and steps in the arguments of a recipe that pretrains a small VLM.

    Raises:
        ValueError: `questions_per_type` has not one number for each of `types`, or a number is too small.
    """
    if len(run.questions_per_type) != len(types):
        raise ValueError(
            f"--questions_per_type must have one number for each of {', '.join(types)}, got {run.questions_per_type}."
        )
    require_positive(run, "eval_questions")
    if run.tower_steps < 0:
        raise ValueError(f"--tower_steps must be at least 0, got {run.tower_steps}.")


def training_scenes(
    args: SmallVLMTrainingArguments, scenes: SceneArguments, questions: Sequence[int], captions: bool = False
) -> SceneQuestionDataset:
    """Returns a data set with new scenes for every step of a run.

    Args:
        args: training arguments; `max_steps` and the batch size give the number of scenes.
        scenes: which scenes are drawn.
        questions: maximum number of questions about a scene, for each of `scenes.types`.
        captions: also ask for a caption of each scene.
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
    """Pretrains a vision tower on patch labels; prints and returns the accuracy of a linear probe on held-out patches.

    Args:
        tower: module to train.
        features: function from pixel values to features `(batch, side², size)`, one per patch in reading order.
        processor: the VLM's processor.
        args: arguments of the VLM training that follows; device and display settings are used here, too.
        lesson: data and hyperparameters of the pretraining.
        folder: output folder of the run; files go into its subfolder `tower`.
        extra_modules: further modules that `features` uses and that are trained, too.
    """
    accuracies = pretrain_tower(
        tower,
        features,
        processor.image_processor,
        lesson,
        folder.path / "tower",
        extra_modules=extra_modules,
        resume=folder.resumes,
        trainer_arguments={"use_cpu": args.use_cpu, "disable_tqdm": args.disable_tqdm, "report_to": "none"},
    )
    PartialState().print("tower: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items()))
    return accuracies


def train_small_vlm(
    folder: RunFolder,
    settings: dict[str, Any],
    args: SmallVLMTrainingArguments,
    teach: Callable[[], dict[str, float]] | None,
    build_trainer: Callable[[], SmallVLMTrainer],
) -> tuple[SmallVLMTrainer, dict[str, float]]:
    """Pretrains the tower, unless the run resumes from a checkpoint, then trains the whole model and saves it.

    Args:
        folder: output folder of the run; `start` is called here.
        settings: settings that determine the run's result (`fingerprints.settings_of`).
        args: training arguments.
        teach: pretrains the tower and returns the probe's accuracies; None skips the pretraining.
        build_trainer: builds the trainer; called after the pretraining.

    Returns:
        the trainer after training, and the result of `teach`, from this run or the run that it resumes.
    """
    folder.start({"": settings})
    checkpoint = folder.checkpoint(average_files(args))
    probe_accuracies = earlier_accuracy(folder.path / "tower")
    if teach is not None and checkpoint is None:
        probe_accuracies = teach()
    trainer = build_trainer()
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.unwrapped_model.requires_grad_(True)
    trainer.save_model(str(folder.path))
    return trainer, probe_accuracies


def answer_accuracy(model: Any, processor: Any, rows: Any) -> dict[str, float]:
    """Returns the accuracy of a VLM's greedy answers to each row's first question, by question type and for "all"."""
    answers = generate_answers(model, VQACollator(processor, answers=False), rows)
    scores = vqa_accuracy(answers, [row["answers"][0] for row in rows])
    return accuracy_by_type(scores, [row["types"][0] for row in rows])


def write_report(
    folder: Path, name: str, model: Any, results: dict[str, Any], measured: Mapping[str, Any], repo_id: str | None
) -> None:
    """Writes results.json and the model card of a small VLM into its folder.

    Args:
        folder: model folder.
        name: name of the architecture.
        model: the trained model.
        results: results of the run.
        measured: the results that the card's metadata lists.
        repo_id: `user/name` of the repository that the folder will be uploaded to, or None.
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
