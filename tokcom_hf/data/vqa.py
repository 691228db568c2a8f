"""Loads visual question answering rows from JSON lines with images, or from the Hub.

`vqa_dataset.py` defines a row, `scene_rows.py` generates rows, and `vqa_collator.py` turns them into model inputs; this
module re-exports their names.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .image_columns import encoded_images, image_bytes
from .image_rows import ImageTextRow, check_images, image_folder
from .scene_rows import scene_rows
from .text_files import read_json_objects
from .vqa_collator import IGNORED, VQACollator, require_placeholder
from .vqa_dataset import CAPTION_REQUEST, VQADataset

__all__ = [
    "CAPTION_REQUEST",
    "COLUMN_MAPPINGS",
    "EXPECTED",
    "IGNORED",
    "VQACollator",
    "VQADataset",
    "load_hub_vqa",
    "map_vqa_columns",
    "read_vqa_jsonl",
    "require_placeholder",
    "scene_rows",
]

# Column names of well-known data sets: part of the data set's name -> (image, question, answers, type or None).
COLUMN_MAPPINGS: dict[str, tuple[str, str, str, str | None]] = {
    "vqav2": ("image", "question", "answers", "answer_type"),
    "gqa": ("image", "question", "answer", None),
    "pope": ("image", "question", "answer", "category"),
    "scienceqa": ("image", "question", "answer", "subject"),
}
# Fields that a JSON line needs for each task, for error messages.
EXPECTED = {
    "vqa": "image, question and answer",
    "caption": "image and caption",
    "both": "image, and a question with its answer, a caption, or both",
}


def read_vqa_jsonl(
    path: str | Path, image_dir: str | Path | None = None, allow_outside: bool = False, task: str = "vqa"
) -> VQADataset:
    """Reads JSON lines `{"image": "a.png", "question": "...", "answer": "..." or ["...", ...], "type": "..."}`.

    `image` is relative to `image_dir` (the file's own folder by default) and may be missing for text-only rows; `type`
    is optional. All images are checked (`image_rows.check_images`).

    Args:
        allow_outside: also accept absolute image paths and paths outside that folder.
        task: `vqa`: every line needs a question and its answer; `caption`: every line needs an image and its `caption`;
            `both`: every line needs either of these, or both.

    Raises:
        FileNotFoundError: the file or an image is missing.
        NotADirectoryError: `image_dir` is no folder.
        ValueError: a line is not JSON or lacks a field; or an image is broken, is a URL, or lies outside the folder. The
            message names the line.
    """
    folder = image_folder(path, image_dir)
    rows, images = [], []
    for place, record in read_json_objects(path):
        line = ImageTextRow(place, record, EXPECTED[task])
        caption = None
        if task == "caption" or (task == "both" and record.get("caption") is not None):
            caption = line.text("caption")
        has_question = task == "vqa" or (task == "both" and (caption is None or record.get("question") is not None))
        pair = (line.text("question"), line.texts("answer")) if has_question else None
        image = line.image(folder, allow_outside)
        if image is not None:
            images.append((place, image))
        elif caption is not None:
            raise ValueError(f"{place}: expected JSON with {line.expected}, but 'image' is missing.")
        row: dict[str, Any] = {"image": image, "questions": [], "answers": [], "types": []}
        if pair is not None:
            row |= {"questions": [pair[0]], "answers": [pair[1]], "types": [line.texts("type", "all")[0]]}
        rows.append(row if caption is None else row | {"caption": caption})
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    check_images(images, len(images))
    return VQADataset(rows)


def load_hub_vqa(
    name: str, config: str | None = None, split: str = "train", max_rows: int | None = None, mapping: str | None = None
) -> VQADataset:
    """Loads a Hub data set with the columns of VQAv2, GQA, POPE or ScienceQA.

    Args:
        name, config, split: the Hub data set, its configuration and its split.
        max_rows: read at most this many rows.
        mapping: a key of `COLUMN_MAPPINGS`; None finds the mapping by `name`.

    Raises:
        ValueError: no column mapping is known, a column is missing, or an image is broken.
    """
    from datasets import load_dataset

    data = encoded_images(load_dataset(name, config, split=split))
    if max_rows is not None:
        data = data.select(range(min(max_rows, len(data))))
    return map_vqa_columns(data, mapping or name)


def map_vqa_columns(data: Iterable[dict[str, Any]], name: str) -> VQADataset:
    """Applies the column mapping whose key occurs in `name` (case and punctuation ignored).

    Raises:
        ValueError: no column mapping is known, a column is missing or holds no images, or an image is broken.
    """
    plain = "".join(c for c in name.lower() if c.isalnum())
    key = next((k for k in COLUMN_MAPPINGS if k in plain), None)
    if key is None:
        raise ValueError(
            f"No column mapping for data set {name!r}; known are {', '.join(COLUMN_MAPPINGS)}. Name one with "
            "--column_mapping, or write the data as JSON lines."
        )
    image, question, answer, kind = COLUMN_MAPPINGS[key]
    rows, images = [], []
    for number, record in enumerate(data):
        missing = [column for column in (question, answer) if column not in record]
        if missing:
            raise ValueError(f"Data set {name!r} lacks columns {missing}; it has {sorted(record)}.")
        text, answers = record[question], _answers(record[answer])
        if "choices" in record and isinstance(record[answer], int):
            # In ScienceQA the answer is the index of the right choice.
            text = f"{text} Choices: {', '.join(record['choices'])}."
            answers = [record["choices"][record[answer]]]
        picture = image_bytes(record.get(image), f"Row {number} of data set {name!r}")
        if isinstance(picture, bytes):
            images.append((f"row {number} of {name!r}", io.BytesIO(picture)))
        rows.append(
            {
                "image": picture,
                "questions": [text],
                "answers": [answers],
                "types": [str(record.get(kind) or "all") if kind else "all"],
            }
        )
    check_images(images, len(images))
    return VQADataset(rows)


def _answers(value) -> list[str]:
    """Returns the accepted answers, the most frequent first: VQAv2 has ten per question, all needed for its soft score."""
    if isinstance(value, list):
        words = [v["answer"] if isinstance(v, dict) else str(v) for v in value]
        return sorted(words, key=lambda word: -words.count(word))
    return [str(value)]
