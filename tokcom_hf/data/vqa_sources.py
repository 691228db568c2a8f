"""Where VQA rows come from, as recipe options: procedural scenes unless a file or a Hub data set is named."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .vqa import VQADataset, load_hub_vqa, read_vqa_jsonl, scene_rows


@dataclass
class VQASourceArguments:
    """Data of a pruning recipe."""

    train_file: str | None = field(default=None, metadata={"help": "JSON lines with image, question, answer."})
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
    prompt: str = field(
        default="<image> {question}", metadata={"help": "Prompt; LLaVA-1.5: 'USER: <image>\\n{question} ASSISTANT:'."}
    )
    data_seed: int = field(default=7, metadata={"help": "Seed of the procedural scenes."})


def load_vqa_rows(
    source: VQASourceArguments, base_model: str, training: bool = True
) -> tuple[VQADataset | None, VQADataset]:
    """Training rows (None where `training` is False) and held-out rows.

    Scenes take the options the small VLM was trained with, which stand in its `results.json`.

    Raises:
        ValueError: training rows without held-out rows.
    """
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
        read = lambda file: read_vqa_jsonl(file, source.image_dir, source.allow_outside)  # noqa: E731
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
