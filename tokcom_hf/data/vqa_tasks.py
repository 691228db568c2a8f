"""Chooses whether a row of `vqa.py` is trained and evaluated on its question or on its caption.

A `caption` becomes the answer to a request for it. With task `both`, training alternates within each batch, among the rows
that have a question and a caption; two such rows are enough for a batch to contain both tasks.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from .vqa import EXPECTED
from .vqa_collator import VQACollator
from .vqa_dataset import CAPTION_REQUEST, VQADataset

TASKS = tuple(EXPECTED)


def check_task(task: str) -> str:
    """Returns `task` if it is one of `TASKS`; raises ValueError otherwise."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    return task


def caption_row(row: dict[str, Any], request: str = CAPTION_REQUEST) -> dict[str, Any]:
    """Returns the row with `request` as its only question and the caption as its answer; metrics read its `task`."""
    return {
        "image": row["image"],
        "questions": [request],
        "answers": [[row["caption"]]],
        "types": ["caption"],
        "task": "caption",
    }


def evaluation_rows(
    rows: VQADataset, task: str, request: str = CAPTION_REQUEST, captions: int | None = None
) -> VQADataset:
    """Returns the rows that `task` is evaluated on: questions, then at most `captions` requests for captions.

    Raises:
        ValueError: the task is unknown, or no row has what it needs.
    """
    if check_task(task) == "vqa":
        return rows
    questions = [row for row in rows.rows if row["questions"]] if task == "both" else []
    requests = [caption_row(row, request) for row in rows.rows if row.get("caption")][:captions]
    check_rows(rows, task)
    return VQADataset(
        [{name: value for name, value in row.items() if name != "caption"} for row in questions] + requests
    )


def check_rows(rows: VQADataset, task: str) -> None:
    """Raises ValueError if no row has a question or a caption that `task` needs."""
    needs = {"vqa": ("question",), "caption": ("caption",), "both": ("question", "caption")}[check_task(task)]
    for name in needs:
        if not any(row["questions"] if name == "question" else row.get("caption") for row in rows.rows):
            raise ValueError(
                f"task: {task} needs a {name} in at least one row, and none of {len(rows)} has one; "
                f"set task: {'vqa' if name == 'caption' else 'caption'}, or name data that has them."
            )


@dataclass
class TaskCollator:
    """Turns each row of a training batch into its questions or into a request for its caption, then collates the rows.

    Args:
        collator: collator that turns rows into model inputs.
        task: `vqa`, `caption` or `both`. In `both`, every second row of a batch that has a question and a caption is trained
            on its caption; in a batch of one row, a checksum of its question chooses.
        caption_request: the question whose answer is the caption.

    Raises:
        ValueError: the task is unknown.
    """

    collator: VQACollator
    task: str = "both"
    caption_request: str = CAPTION_REQUEST

    def __post_init__(self):
        check_task(self.task)

    @property
    def processor(self):
        """The processor of the inner collator."""
        return self.collator.processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chosen, seen = [], 0
        for row in rows:
            captioned = bool(row.get("caption")) and (self.task == "caption" or not row["questions"])
            if self.task == "both" and row.get("caption") and row["questions"]:
                # Depends on the batch alone, so the choice is the same after resuming and in every worker.
                captioned = bool((zlib.crc32(row["questions"][0].encode()) if len(rows) == 1 else seen) % 2)
                seen += 1
            chosen.append(caption_row(row, self.caption_request) if captioned else row)
        return self.collator(chosen)
