"""Images with a caption and a question, read from JSON lines, and the model inputs of joint LFQ training.

A row has the format of `vqa_dataset.py` and a `caption`. `scene_rows.py` generates such rows; this module re-exports its
names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .image_rows import ImageTextRow, check_images, image_folder
from .packed_vqa import PackedVQACollator
from .scene_rows import SceneArguments, scene_caption_rows
from .text_files import read_json_objects
from .vqa_collator import VQACollator, pad_rows, require_placeholder
from .vqa_dataset import CAPTION_REQUEST, VQADataset

__all__ = [
    "JointLFQCollator",
    "SceneArguments",
    "check_image_text_files",
    "read_image_text_jsonl",
    "scene_caption_rows",
]


def check_image_text_files(run: Any) -> None:
    """Checks that options of a recipe about files of images and captions belong together.

    Args:
        run: has the attributes `image_text_file`, `eval_file`, `image_dir` and `allow_outside`.

    Raises:
        ValueError: one file without the other, or an option about the files' images without files.
    """
    if bool(run.image_text_file) != bool(run.eval_file):
        raise ValueError("--image_text_file and --eval_file (held-out lines of the same form) belong together.")
    for name in ("image_dir", "allow_outside"):
        if getattr(run, name) and not run.image_text_file:
            raise ValueError(f"--{name} needs --image_text_file, the JSON lines that name the images.")


def read_image_text_jsonl(
    path: str | Path, image_dir: str | Path | None = None, allow_outside: bool = False
) -> VQADataset:
    """Reads JSON lines `{"image": "a.png", "caption": "...", "question": "...", "answer": "..."}`.

    `image` is relative to `image_dir` (the file's own folder by default). A line without `question` gets a request for
    the caption as its question. All images are checked (`image_rows.check_images`).

    Args:
        allow_outside: also accept absolute image paths and paths outside that folder.

    Raises:
        FileNotFoundError: the file or an image is missing.
        NotADirectoryError: `image_dir` is no folder.
        ValueError: a line is not JSON or lacks its image, its caption or the answer to its question; or an image is
            broken, is a URL, or lies outside the folder. The message names the line.
    """
    folder = image_folder(path, image_dir)
    rows, images = [], []
    for place, record in read_json_objects(path):
        line = ImageTextRow(place, record, "image, caption and, if it has a question, its answer")
        caption, question = line.text("caption"), line.text("question", "")
        answers = line.texts("answer") if question else [caption]
        image = line.image(folder, allow_outside)
        if image is None:
            raise ValueError(f"{place}: expected JSON with {line.expected}, but 'image' is missing.")
        images.append((place, image))
        rows.append(
            {
                "image": image,
                "caption": caption,
                "questions": [question or CAPTION_REQUEST],
                "answers": [answers],
                "types": [line.texts("type", "all")[0]],
            }
        )
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    check_images(images, len(images))
    return VQADataset(rows)


@dataclass
class JointLFQCollator:
    """Turns rows of this module into the inputs of joint LFQ training: questions with answers, and captions to draw.

    Args:
        processor: the vision-language model's processor.
        prompt: prompt of a question; `<image>` stands for the image.
        caption_prompt: prompt for drawing an image; `{caption}` is replaced, other braces stay as they are.
        packed: put all questions about an image in one sequence with it, and mask them from each other, as if each were
            asked alone (needs sdpa or eager attention). Otherwise the questions follow each other as in a dialogue.

    Returns (when called):
        the inputs of `PackedVQACollator` or `VQACollator`, and `caption_ids` and `caption_mask` `(batch, length)`: the
        caption and the start-of-image token, padded on the left, so that the image tokens begin at the same position in
        every row.
    """

    processor: Any
    prompt: str = "<image> {question}"
    caption_prompt: str = "{caption}"
    packed: bool = False

    def __post_init__(self):
        require_placeholder("caption_prompt", self.caption_prompt, "{caption}")
        kind = PackedVQACollator if self.packed else VQACollator
        self.questions = kind(self.processor, self.prompt)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.questions(rows)
        tokenizer = self.processor.tokenizer
        start = tokenizer.convert_tokens_to_ids(self.processor.start_image_token)
        captions = []
        for row in rows:
            text = self.caption_prompt.replace("{caption}", row["caption"])
            ids = tokenizer(text, add_special_tokens=False).input_ids
            captions.append(torch.tensor([*ids, start]))
        length = max(len(ids) for ids in captions)
        batch["caption_ids"] = pad_rows(captions, length, tokenizer.pad_token_id or 0, left=True)
        batch["caption_mask"] = pad_rows([torch.ones_like(ids) for ids in captions], length, 0, left=True)
        return batch
