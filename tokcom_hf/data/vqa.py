"""Visual question answering rows from procedural scenes, from JSON lines with images, or from the Hub.

Whatever the source, a row is `{"image": PIL.Image or None, "questions": [str], "answers": [[str, ...]], "types": [str]}`:
one image, one or more questions, and per question every accepted answer, the one to train on first. A row may also have a
`caption`, which `vqa_tasks.py` makes an answer.
"""

import io
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.shared_image_files import read_image
from .image_columns import encoded_images, image_bytes
from .image_rows import ImageTextRow, check_images, image_folder
from .scenes import (
    COLOURS,
    QUESTION_TYPES,
    SHAPES,
    SceneQuestion,
    balanced_examples,
    render_scene,
    sample_scene,
    scene_caption,
    scene_questions,
)
from .text_files import read_json_objects

# Column names of well-known data sets: name prefix -> (image, question, answers, type or None).
COLUMN_MAPPINGS: dict[str, tuple[str, str, str, str | None]] = {
    "vqav2": ("image", "question", "answers", "answer_type"),
    "gqa": ("image", "question", "answer", None),
    "pope": ("image", "question", "answer", "category"),
    "scienceqa": ("image", "question", "answer", "subject"),
}
# What a line of JSON holds for each task.
EXPECTED = {
    "vqa": "image, question and answer",
    "caption": "image and caption",
    "both": "image, and question and answer or caption",
}
IGNORED = -100
CAPTION_REQUEST = "what is in the image ?"


class VQADataset(torch.utils.data.Dataset):
    """Rows held in memory; images are paths, bytes of files, or PIL images, and come out as upright RGB PIL images."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = row["image"]
        if image is None:
            return row
        try:
            return row | {"image": read_image(io.BytesIO(image) if isinstance(image, bytes) else image)}
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error


def scene_rows(
    count: int,
    seed: int,
    image_size: int = 64,
    questions_per_image: int = 1,
    num_shapes: int = len(SHAPES),
    num_colours: int = len(COLOURS),
    min_objects: int = 2,
    max_objects: int = 6,
    grid: int = 4,
    types: Sequence[str] = QUESTION_TYPES,
    captions: bool = False,
) -> VQADataset:
    """Seeded procedural rows. With one question per image the answers balance exactly (use this to evaluate).

    `captions` adds, after the questions of an image, the request for its caption: dense supervision that a model
    trained from scratch needs to learn to see.
    """
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "min_objects": min_objects,
        "max_objects": max_objects,
        "grid": grid,
        "shapes": SHAPES[:num_shapes],
        "colours": tuple(COLOURS)[:num_colours],
    }
    rows = []
    if questions_per_image == 1:
        for example in balanced_examples(rng, count, types, **options):
            rows.append(_scene_row(example.scene, example.questions, image_size))
        return VQADataset(rows)
    while len(rows) < count:
        scene = sample_scene(rng, **options)
        questions = scene_questions(scene, rng, types, per_type=-(-questions_per_image // len(types)))
        questions = questions[:questions_per_image]
        if captions:
            questions.append(SceneQuestion(CAPTION_REQUEST, scene_caption(scene).replace(",", " ,"), "caption"))
        rows.append(_scene_row(scene, questions, image_size))
    return VQADataset(rows)


def _scene_row(scene, questions, image_size: int) -> dict[str, Any]:
    return {
        "image": render_scene(scene, image_size),
        "questions": [q.question for q in questions],
        "answers": [[q.answer] for q in questions],
        "types": [q.type for q in questions],
        "caption": scene_caption(scene).replace(",", " ,"),
    }


def read_vqa_jsonl(
    path: str | Path, image_dir: str | Path | None = None, allow_outside: bool = False, task: str = "vqa"
) -> VQADataset:
    """Reads JSON lines `{"image": "a.png", "question": "...", "answer": "..." or ["...", ...], "type": "..."}`.

    `image` is relative to `image_dir` (the file's own folder by default) and may be missing for text-only rows; `type`
    is optional. All images are checked (`image_rows.check_images`).

    Args:
        allow_outside: take images by absolute paths and outside that folder, too.
        task: `vqa`: every line has a question and its answer; `caption`: every line has an image and its `caption`;
            `both`: every line has one of these or both.

    Raises:
        FileNotFoundError: the file or an image is missing.
        NotADirectoryError: `image_dir` is no folder.
        ValueError: a line is not JSON or lacks a field, an image is broken, a URL, or lies outside the folder; the message
            names the line.
    """
    folder = image_folder(path, image_dir)
    rows, images = [], []
    for place, record in read_json_objects(path):
        line = ImageTextRow(place, record, EXPECTED[task])
        caption = None
        if task == "caption" or (task == "both" and record.get("caption") is not None):
            caption = line.text("caption")
        asked = task == "vqa" or (task == "both" and (caption is None or record.get("question") is not None))
        pair = (line.text("question"), line.texts("answer")) if asked else None
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
    """Loads a Hub data set; VQAv2, GQA, POPE and ScienceQA columns are known by name, or by `mapping`.

    Raises:
        ValueError: no known mapping, the columns are not there, or an image is broken.
    """
    from datasets import load_dataset

    data = encoded_images(load_dataset(name, config, split=split))
    if max_rows is not None:
        data = data.select(range(min(max_rows, len(data))))
    return map_vqa_columns(data, mapping or name)


def map_vqa_columns(data: Iterable[dict[str, Any]], name: str) -> VQADataset:
    """Applies the column mapping whose key occurs in `name` (case and punctuation ignored).

    Raises:
        ValueError: no such mapping, a column is not there or holds no images, or an image is broken.
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
            # ScienceQA gives the index of the right choice.
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
    """VQAv2 holds ten `{"answer": ...}` records; the most frequent comes first, all ten stay for the soft score."""
    if isinstance(value, list):
        words = [v["answer"] if isinstance(v, dict) else str(v) for v in value]
        return sorted(words, key=lambda word: -words.count(word))
    return [str(value)]


@dataclass
class VQACollator:
    """Turns rows into model inputs with labels on the answers (and the end token) only.

    Args:
        processor: the VLM's processor.
        prompt: text before the answer; `{question}` is replaced, `<image>` stands for the processor's image token. Other
            braces stay as they are.
        follow_up: prompt of the second and later questions about the same image.
        answers: append the answers and return `labels`; off for generation, where rows are padded on the left.
        max_questions: use so many questions of a row at most.
        image_limit: makes an image smaller before the processor sees it (`image_limit.ImageLimit`).

    Raises:
        ValueError: a prompt without `{question}`.
    """

    processor: Any
    prompt: str = "<image> {question}"
    follow_up: str = " {question}"
    answers: bool = True
    max_questions: int | None = None
    image_limit: Callable[[Any], Any] | None = None

    def __post_init__(self):
        require_placeholder("prompt", self.prompt, "{question}")
        require_placeholder("follow_up", self.follow_up, "{question}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        image_token = getattr(self.processor, "image_token", "<image>")
        texts, images = [], []
        for row in rows:
            prompt = self.prompt if row["image"] is not None else self.prompt.replace("<image>", "").lstrip()
            texts.append(prompt.replace("<image>", image_token).replace("{question}", row["questions"][0]))
            if row["image"] is not None:
                images.append(row["image"] if self.image_limit is None else self.image_limit(row["image"]))
        inputs = dict(self.processor(text=texts, images=images or None, return_tensors="pt", padding=True))
        mask = inputs.pop("attention_mask").bool()
        width = mask.shape
        sequences = {k: inputs.pop(k) for k in list(inputs) if inputs[k].shape == width}
        rows_of = {key: [value[m] for value, m in zip(values, mask)] for key, values in sequences.items()}
        labels = [torch.full_like(ids, IGNORED) for ids in rows_of["input_ids"]]
        if self.answers:
            for i, row in enumerate(rows):
                answer_ids, answer_labels = self._answer_ids(tokenizer, row)
                for key, values in rows_of.items():
                    extra = answer_ids if key == "input_ids" else torch.zeros_like(answer_ids)
                    values[i] = torch.cat([values[i], extra.to(values[i].dtype)])
                labels[i] = torch.cat([labels[i], answer_labels])
        length = max(len(ids) for ids in rows_of["input_ids"])
        pad = tokenizer.pad_token_id or 0
        left = not self.answers
        for key, values in rows_of.items():
            inputs[key] = _pad(values, length, pad if key == "input_ids" else 0, left)
        inputs["attention_mask"] = _pad([torch.ones_like(ids) for ids in rows_of["input_ids"]], length, 0, left)
        if self.answers:
            inputs["labels"] = _pad(labels, length, IGNORED, left)
        return inputs

    def _answer_ids(self, tokenizer, row) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = [], []
        pairs = list(zip(row["questions"], row["answers"]))[: self.max_questions]
        for turn, (question, answers) in enumerate(pairs):
            if turn:
                asked = tokenizer(self.follow_up.replace("{question}", question), add_special_tokens=False).input_ids
                ids += asked
                labels += [IGNORED] * len(asked)
            told = tokenizer(f" {answers[0]}", add_special_tokens=False).input_ids
            if tokenizer.eos_token_id is not None:
                told = [*told, tokenizer.eos_token_id]
            ids += told
            labels += told
        return torch.tensor(ids), torch.tensor(labels)


def require_placeholder(name: str, prompt: str, placeholder: str) -> None:
    """Raises ValueError where `prompt` lacks the `placeholder`, misspelt for example: it would be the same for all rows."""
    if placeholder not in prompt:
        raise ValueError(f"{name} must contain {placeholder}, got {prompt!r}.")


def _pad(rows: list[torch.Tensor], length: int, value: int, left: bool) -> torch.Tensor:
    missing = [length - len(row) for row in rows]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return torch.stack([torch.nn.functional.pad(row, side, value=value) for row, side in zip(rows, sides)])
