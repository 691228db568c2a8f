"""Where VQA rows come from, as recipe options: procedural scenes unless a file or a Hub data set is named."""

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
    """Data of a pruning recipe."""

    task: str = field(
        default="vqa",
        metadata={"help": "vqa (questions), caption, or both: every batch mixes questions and captions."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines with image, question, answer; for captions with image, caption."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of their images; the file's own if not set."}
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Let JSON lines name images by absolute paths and outside that folder."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub (VQAv2, GQA, POPE, ScienceQA)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    column_mapping: str | None = field(default=None, metadata={"help": "vqav2, gqa, pope or scienceqa."})
    train_images: int = field(default=4000, metadata={"help": "Training scenes, or rows of the Hub data set."})
    questions_per_image: int = field(default=3, metadata={"help": "Questions about each training scene."})
    eval_questions: int = field(default=500, metadata={"help": "Held-out questions."})
    eval_captions: int = field(default=200, metadata={"help": "Held-out captions, at most (task caption or both)."})
    caption_request: str = field(default=CAPTION_REQUEST, metadata={"help": "The question that a caption answers."})
    prompt: str = field(
        default="<image> {question}", metadata={"help": "Prompt; LLaVA-1.5: 'USER: <image>\\n{question} ASSISTANT:'."}
    )
    data_seed: int = field(default=7, metadata={"help": "Seed of the procedural scenes."})
    image_max_size: int | None = field(
        default=None,
        metadata={"help": "Longest side of an image in pixels; larger ones are shrunk before the processor."},
    )
    max_vision_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Vision tokens of an image, at most: images are shrunk until their processor makes no more; where it "
            "makes a fixed number, the merger or strategy must leave no more."
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
                f"task: {self.task} needs captions, and the columns known of Hub data sets have none; write the data as "
                "JSON lines with image and caption (--train_file, --eval_file), or set task: vqa."
            )
        for name in ("image_max_size", "max_vision_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def load_vqa_rows(
    source: VQASourceArguments, base_model: str, training: bool = True
) -> tuple[VQADataset | None, VQADataset]:
    """Training rows (None where `training` is False) and held-out rows.

    Scenes take the options the small VLM was trained with, which stand in its `results.json`. Held-out rows of task `both`
    are the questions, then the captions; training rows are split between them by `vqa_collator`.

    Raises:
        ValueError: training rows without held-out rows, or rows that lack what the task needs.
    """
    train, held_out = _load_rows(source, base_model, training)
    if train is not None and source.task != "vqa":
        check_rows(train, source.task)
    return train, evaluation_rows(held_out, source.task, source.caption_request, source.eval_captions)


def vqa_collator(
    source: VQASourceArguments, processor, answers: bool = True, kept: Callable[[int], int] | None = None
) -> VQACollator | TaskCollator:
    """The collator of a pruning recipe: with `answers` for training, without them for generation.

    Args:
        source: its prompt, task and image limits.
        processor: of the VLM.
        answers: see `VQACollator`.
        kept: tokens that stay of so many before the language model, see `ImageLimit`.
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
            raise ValueError("--train_file needs --eval_file, held-out JSON lines of the same form.")
        if training and not source.train_file:
            raise ValueError("--eval_file alone is for evaluation; training needs --train_file too.")
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
    """The scenes that a small VLM, or what was made from it, was trained on: `scenes` in its `results.json`."""
    for folder in (Path(model), Path(model) / "base"):
        if (folder / "results.json").is_file():
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if "scenes" in results:
                return results["scenes"]
    return {"image_size": 224}
