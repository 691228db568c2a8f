"""Recipe options for the source of VQA rows: JSON lines, a Hub data set, or else procedural scenes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .image_limit import ImageLimit
from .scene_rows import scene_rows
from .vqa import load_hub_vqa, read_vqa_jsonl
from .vqa_collator import VQACollator, require_placeholder
from .vqa_dataset import CAPTION_REQUEST, VQADataset
from .vqa_tasks import TaskCollator, check_rows, check_task, evaluation_rows


@dataclass
class VQASourceArguments:
    """Data of a pruning recipe: its task, its source of rows, its prompt, and its limits on images."""

    task: str = field(
        default="vqa",
        metadata={"help": "vqa (questions), caption, or both (every batch mixes questions and captions)."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON lines to train on, with image, question and answer (task caption: image and caption)."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on, of the same form."})
    image_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the images that JSON lines name; by default the folder of the file."},
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Let JSON lines name images by absolute paths and outside image_dir."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub (VQAv2, GQA, POPE, ScienceQA)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub data set to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split of the Hub data set to evaluate on."})
    column_mapping: str | None = field(
        default=None,
        metadata={
            "help": "Column names of the Hub data set: vqav2, gqa, pope or scienceqa; by default from its name."
        },
    )
    train_images: int = field(
        default=4000,
        metadata={"help": "Number of training scenes, or maximum number of training rows of the Hub data set."},
    )
    questions_per_image: int = field(default=3, metadata={"help": "Number of questions about each training scene."})
    eval_questions: int = field(
        default=500,
        metadata={
            "help": "Number of held-out questions about scenes, or maximum number of held-out rows of the Hub data set."
        },
    )
    eval_captions: int = field(
        default=200, metadata={"help": "Maximum number of held-out captions (task caption or both)."}
    )
    caption_request: str = field(
        default=CAPTION_REQUEST, metadata={"help": "Question whose answer is the caption (task caption or both)."}
    )
    prompt: str = field(
        default="<image> {question}",
        metadata={"help": "Text before the answer; for LLaVA-1.5: 'USER: <image>\\n{question} ASSISTANT:'."},
    )
    data_seed: int = field(default=7, metadata={"help": "Seed of the procedural scenes."})
    image_max_size: int | None = field(
        default=None,
        metadata={"help": "Maximum length of an image's longest side, in pixels; larger images are shrunk."},
    )
    max_vision_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of vision tokens per image; images are shrunk to reach it. If the processor makes a "
            "fixed number of tokens, the limit applies to those that the merger or strategy keeps."
        },
    )

    def __post_init__(self):
        check_task(self.task)
        require_placeholder("prompt", self.prompt, "{question}")
        for name in ("train_file", "eval_file"):
            file = getattr(self, name)
            if file is not None and not Path(file).is_file():
                raise FileNotFoundError(f"{name} {file!r} does not exist.")
        if self.task != "vqa" and self.dataset_name:
            raise ValueError(
                f"task: {self.task} needs captions, but the known column mappings of Hub data sets have none; write the "
                "data as JSON lines with image and caption (--train_file, --eval_file), or set task: vqa."
            )
        for name in ("image_max_size", "max_vision_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def load_vqa_rows(
    source: VQASourceArguments, base_model: str, training: bool = True
) -> tuple[VQADataset | None, VQADataset]:
    """Loads training rows (None where `training` is False) and held-out rows.

    Procedural scenes are drawn with the options that the small VLM was trained with, which its `results.json` holds. For
    task `both`, held-out rows are all questions, then all captions; in training, `vqa_collator` chooses per row.

    Args:
        source: the recipe's data options.
        base_model: folder or Hub name of the VLM.
        training: also load training rows.

    Raises:
        ValueError: `train_file` is given without `eval_file`, `eval_file` alone for training, or the rows lack what the task
            needs.
    """
    train, held_out = _load_rows(source, base_model, training)
    if train is not None and source.task != "vqa":
        check_rows(train, source.task)
    return train, evaluation_rows(held_out, source.task, source.caption_request, source.eval_captions)


def vqa_collator(
    source: VQASourceArguments, processor, answers: bool = True, kept: Callable[[int], int] | None = None
) -> VQACollator | TaskCollator:
    """Builds the collator of a pruning recipe: with `answers` for training, without them for generation.

    Args:
        source: the recipe's data options, of which prompt, task and image limits are used.
        processor: the VLM's processor.
        answers: see `VQACollator`.
        kept: function from the number of vision tokens to the number left before the language model, see `ImageLimit`.
    """
    limit = None
    if source.image_max_size is not None or source.max_vision_tokens is not None:
        limit = ImageLimit(processor, source.image_max_size, source.max_vision_tokens, kept)
    collator = VQACollator(processor, source.prompt, answers=answers, image_limit=limit)
    if not answers or source.task == "vqa":
        return collator
    return TaskCollator(collator, source.task, source.caption_request)


def _load_rows(source: VQASourceArguments, base_model: str, training: bool) -> tuple[VQADataset | None, VQADataset]:
    if source.dataset_name:
        load = lambda split, count: load_hub_vqa(  # noqa: E731
            source.dataset_name or "", source.dataset_config, split, count, source.column_mapping
        )
        train = load(source.train_split, source.train_images) if training else None
        return train, load(source.eval_split, source.eval_questions)
    if source.train_file or source.eval_file:
        if not source.eval_file:
            raise ValueError("--train_file needs --eval_file: held-out JSON lines of the same form.")
        if training and not source.train_file:
            raise ValueError("--eval_file alone only evaluates; training also needs --train_file.")
        read = lambda file: read_vqa_jsonl(  # noqa: E731
            file, source.image_dir, source.allow_outside, source.task
        )
        return read(source.train_file) if training and source.train_file else None, read(source.eval_file)
    options = scene_options(base_model)
    train = None
    if training:
        train = scene_rows(
            source.train_images, source.data_seed, questions_per_image=source.questions_per_image, **options
        )
    return train, scene_rows(source.eval_questions, source.data_seed + 2_000_003, **options)


def scene_options(model: str) -> dict[str, Any]:
    """Returns the options of the scenes that a small VLM, or the base of a pruned one, was trained on.

    They are the entry `scenes` of its `results.json`; without that file or entry, scenes have 224 pixels per side.
    """
    for folder in (Path(model), Path(model) / "base"):
        if (folder / "results.json").is_file():
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if "scenes" in results:
                return results["scenes"]
    return {"image_size": 224}
