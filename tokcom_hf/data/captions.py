"""Images with a caption and questions: from procedural scenes, or from JSON lines beside image files.

A row is a row of `vqa.py` (`image`, `questions`, `answers`, `types`) with one more entry, `caption`.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .packed_vqa import PackedVQACollator
from .scenes import COLOURS, QUESTION_TYPES, SHAPES, render_scene, sample_scene, scene_caption, scene_questions
from .vqa import CAPTION_REQUEST, VQACollator, VQADataset, _pad


@dataclass
class SceneArguments:
    """Which procedural scenes are drawn."""

    image_size: int = field(default=64, metadata={"help": "Pixels per side."})
    num_shapes: int = field(default=len(SHAPES), metadata={"help": "Different shapes in the scenes."})
    num_colours: int = field(default=len(COLOURS), metadata={"help": "Different colours in the scenes."})
    min_objects: int = field(default=2, metadata={"help": "Fewest objects of a scene."})
    max_objects: int = field(default=6, metadata={"help": "Most objects of a scene."})
    grid: int = field(default=4, metadata={"help": "Cells per side of a scene."})
    types: list[str] = field(
        default_factory=lambda: list(QUESTION_TYPES), metadata={"help": "Which types of questions are asked."}
    )

    def options(self) -> dict[str, Any]:
        """Arguments of `vqa.scene_rows` and of `scene_caption_rows`."""
        return dict(vars(self))

    def sampling(self) -> dict[str, Any]:
        """Arguments of `scenes.sample_scene`."""
        return {
            "min_objects": self.min_objects,
            "max_objects": self.max_objects,
            "grid": self.grid,
            "shapes": SHAPES[: self.num_shapes],
            "colours": tuple(COLOURS)[: self.num_colours],
        }


def scene_caption_rows(
    count: int,
    seed: int,
    questions_per_image: int = 5,
    image_size: int = 64,
    num_shapes: int = len(SHAPES),
    num_colours: int = len(COLOURS),
    min_objects: int = 2,
    max_objects: int = 6,
    grid: int = 4,
    types: Sequence[str] = QUESTION_TYPES,
) -> VQADataset:
    """Seeded procedural scenes, each with its caption and up to `questions_per_image` questions of different types."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        scene = sample_scene(
            rng, min_objects, max_objects, grid, shapes=SHAPES[:num_shapes], colours=tuple(COLOURS)[:num_colours]
        )
        questions = scene_questions(scene, rng, types, per_type=-(-questions_per_image // len(types)))
        questions = questions[:questions_per_image]
        rows.append(
            {
                "image": render_scene(scene, image_size),
                "caption": scene_caption(scene).replace(",", " ,"),
                "questions": [q.question for q in questions],
                "answers": [[q.answer] for q in questions],
                "types": [q.type for q in questions],
            }
        )
    return VQADataset(rows)


def read_image_text_jsonl(path: str | Path, image_dir: str | Path | None = None) -> VQADataset:
    """Reads JSON lines `{"image": "a.png", "caption": "...", "question": "...", "answer": "..."}`.

    `image` is relative to `image_dir` (the file's own folder by default). Without `question`, what is asked for is the
    caption.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: a line is not JSON, or lacks image, caption or the answer to its question; the message names the line.
    """
    path = Path(path)
    folder = Path(image_dir) if image_dir is not None else path.parent
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, caption = folder / record["image"], str(record["caption"])
            question = record.get("question") or CAPTION_REQUEST
            answer = str(record["answer"]) if record.get("question") else caption
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected JSON with image, caption and, beside a question, its answer "
                f"({error!r})."
            ) from error
        if not image.is_file():
            raise FileNotFoundError(f"{path}, line {number}: image {str(image)!r} does not exist.")
        rows.append(
            {
                "image": image,
                "caption": caption,
                "questions": [str(question)],
                "answers": [[answer]],
                "types": [str(record.get("type", "all"))],
            }
        )
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return VQADataset(rows)


@dataclass
class JointLFQCollator:
    """Rows of this module → model inputs of joint LFQ training: questions and answers, and captions to draw from.

    Args:
        processor: of the vision-language model.
        prompt: of a question; `<image>` stands for the image.
        caption_prompt: of an image to be drawn; `{caption}` is replaced.
        packed: questions about an image share it in one sequence and do not see each other, as if each were asked
            alone (needs sdpa or eager attention); otherwise they follow each other like turns of a dialogue.

    Returns (when called):
        what `PackedVQACollator` or `VQACollator` returns, with `caption_ids` and `caption_mask` `(batch, length)`: the
        caption and the start-of-image token, padded on the left, so that the image's tokens follow at the same place
        in every row.
    """

    processor: Any
    prompt: str = "<image> {question}"
    caption_prompt: str = "{caption}"
    packed: bool = False

    def __post_init__(self):
        kind = PackedVQACollator if self.packed else VQACollator
        self.questions = kind(self.processor, self.prompt)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.questions(rows)
        tokenizer = self.processor.tokenizer
        start = tokenizer.convert_tokens_to_ids(self.processor.start_image_token)
        captions = []
        for row in rows:
            text = self.caption_prompt.format(caption=row["caption"])
            ids = tokenizer(text, add_special_tokens=False).input_ids
            captions.append(torch.tensor([*ids, start]))
        length = max(len(ids) for ids in captions)
        batch["caption_ids"] = _pad(captions, length, tokenizer.pad_token_id or 0, left=True)
        batch["caption_mask"] = _pad([torch.ones_like(ids) for ids in captions], length, 0, left=True)
        return batch
