"""Scenes with many questions each, drawn when read: nothing is stored, and a seed gives the same rows everywhere."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from .scenes import QUESTION_TYPES, SceneQuestion, render_scene, sample_scene, scene_caption, scene_questions
from .vqa_dataset import CAPTION_REQUEST


class SceneQuestionDataset(torch.utils.data.Dataset):
    """Training rows in the format of `tokcom_hf.data.vqa`; item `i` depends on `seed` and `i` alone.

    Args:
        count: scenes per epoch.
        seed: seed of the data set.
        image_size: pixels per side of an image.
        per_type: question type -> maximum number of such questions per scene (a scene may support fewer).
        captions: also ask for the caption.
        **scene_options: arguments of `sample_scene`.

    Raises:
        ValueError: `per_type` names an unknown question type, or there is nothing to ask.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        image_size: int,
        per_type: Mapping[str, int],
        captions: bool = False,
        **scene_options: Any,
    ):
        unknown = set(per_type) - set(QUESTION_TYPES)
        if unknown or not (captions or any(n > 0 for n in per_type.values())):
            raise ValueError(
                f"per_type must map question types of {QUESTION_TYPES} to numbers, one above 0, got {dict(per_type)}."
            )
        self.count, self.seed, self.image_size = count, seed, image_size
        self.per_type, self.captions, self.scene_options = dict(per_type), captions, scene_options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"questions {self.seed} {index}")
        questions: list[SceneQuestion] = []
        while not questions:
            scene = sample_scene(rng, **self.scene_options)
            for kind, number in self.per_type.items():
                questions += scene_questions(scene, rng, (kind,), number)
            if self.captions:
                questions.append(SceneQuestion(CAPTION_REQUEST, scene_caption(scene).replace(",", " ,"), "caption"))
        return {
            "image": render_scene(scene, self.image_size),
            "questions": [q.question for q in questions],
            "answers": [[q.answer] for q in questions],
            "types": [q.type for q in questions],
        }
