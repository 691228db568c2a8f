"""Questions, captions, or both in one run: which of the two a row of `vqa.py` is trained and evaluated on.

A row that has a `caption` can be asked for it like for any other answer. In training `both` alternates within each batch, so
that every batch of two rows or more that have both holds both tasks.
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
    """`task`, if it is one of `TASKS`; raises ValueError otherwise."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    return task


def caption_row(row: dict[str, Any], request: str = CAPTION_REQUEST) -> dict[str, Any]:
    """The row as a single question, `request`, whose answer is the caption; `task` tells the metrics what it is."""
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
    """Rows of one question each: the questions, then (at most `captions`) requests for captions, as `task` wants.

    Raises:
        ValueError: an unknown task, or rows that do not hold what it needs.
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
    """Raises ValueError where no row has what `task` needs."""
    needs = {"vqa": ("question",), "caption": ("caption",), "both": ("question", "caption")}[check_task(task)]
    for name in needs:
        if not any(row["questions"] if name == "question" else row.get("caption") for row in rows.rows):
            raise ValueError(
                f"task: {task} needs a {name} in at least one row, and none of {len(rows)} has one; "
                f"set task: {'vqa' if name == 'caption' else 'caption'}, or name data that has them."
            )


@dataclass
class TaskCollator:
    """Makes each row of a training batch a question or a request for its caption.

    Args:
        collator: what turns the rows into model inputs.
        task: `vqa`, `caption` or `both`; in `both` every second row of a batch that has a question and a caption is
            trained on its caption, and a batch of one row on what a checksum of its question says.
        caption_request: the question that the caption answers.

    Raises:
        ValueError: an unknown task.
    """

    collator: VQACollator
    task: str = "both"
    caption_request: str = CAPTION_REQUEST

    def __post_init__(self):
        check_task(self.task)

    @property
    def processor(self):
        """The collator's."""
        return self.collator.processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chosen, seen = [], 0
        for row in rows:
            captioned = bool(row.get("caption")) and (self.task == "caption" or not row["questions"])
            if self.task == "both" and row.get("caption") and row["questions"]:
                # A function of the batch alone: the same after a resume and in every worker.
                captioned = bool((zlib.crc32(row["questions"][0].encode()) if len(rows) == 1 else seen) % 2)
                seen += 1
            chosen.append(caption_row(row, self.caption_request) if captioned else row)
        return self.collator(chosen)
