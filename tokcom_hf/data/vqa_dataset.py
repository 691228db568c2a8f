"""The row format of visual question answering, and a data set of such rows.

A row is `{"image": PIL.Image or None, "questions": [str], "answers": [[str, ...]], "types": [str]}`: one image, one or more
questions, and all accepted answers of each question, of which the first is the training target. A row may also have a
`caption`, which `vqa_tasks.py` turns into a question and its answer.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch

from ..models.shared_image_files import read_image

CAPTION_REQUEST = "what is in the image ?"


class VQADataset(torch.utils.data.Dataset):
    """Rows held in memory. Images may be given as paths, file bytes, or PIL images; items hold upright RGB PIL images."""

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
