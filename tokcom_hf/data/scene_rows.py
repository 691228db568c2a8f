"""Generates visual question answering rows about procedural scenes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .scenes import (
    COLOURS,
    QUESTION_TYPES,
    SHAPES,
    Scene,
    SceneQuestion,
    balanced_examples,
    render_scene,
    sample_scene,
    scene_caption,
    scene_questions,
)
from .vqa_dataset import VQADataset


@dataclass(frozen=True)
class SceneArguments:
    """Which procedural scenes are drawn, and what is asked about them.

    Raises:
        ValueError: a size or number is below 1, there are fewer shapes or colours than asked for, `min_objects` is above
            `max_objects`, `max_objects` is above the number of cells, or a question type is unknown.
    """

    image_size: int = field(default=64, metadata={"help": "Pixels per side of an image."})
    num_shapes: int = field(default=len(SHAPES), metadata={"help": "Number of different shapes in the scenes."})
    num_colours: int = field(default=len(COLOURS), metadata={"help": "Number of different colours in the scenes."})
    min_objects: int = field(default=2, metadata={"help": "Minimum number of objects in a scene."})
    max_objects: int = field(default=6, metadata={"help": "Maximum number of objects in a scene."})
    grid: int = field(default=4, metadata={"help": "Grid cells per side of a scene; each holds at most one object."})
    types: list[str] = field(
        default_factory=lambda: list(QUESTION_TYPES),
        metadata={"help": "Question types: count, colour, shape, relation, detail."},
    )

    def __post_init__(self):
        limits = {"num_shapes": len(SHAPES), "num_colours": len(COLOURS), "image_size": 4096, "grid": 64}
        for name in ("image_size", "num_shapes", "num_colours", "min_objects", "max_objects", "grid"):
            value, most = getattr(self, name), limits.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most and value > most):
                between = "of at least 1" if most is None else f"between 1 and {most}"
                raise ValueError(f"{name} must be a whole number {between}, got {value!r}.")
        if not self.min_objects <= self.max_objects <= self.grid**2:
            raise ValueError(
                f"A scene of {self.grid}×{self.grid} cells holds from 1 to {self.grid**2} objects, one per cell; got "
                f"min_objects={self.min_objects} and max_objects={self.max_objects}."
            )
        unknown = [kind for kind in self.types if kind not in QUESTION_TYPES]
        if unknown or not self.types:
            raise ValueError(f"types must be some of {', '.join(QUESTION_TYPES)}, got {list(self.types)!r}.")

    def sampling(self) -> dict[str, Any]:
        """Returns the arguments of `scenes.sample_scene`."""
        return {
            "min_objects": self.min_objects,
            "max_objects": self.max_objects,
            "grid": self.grid,
            "shapes": SHAPES[: self.num_shapes],
            "colours": tuple(COLOURS)[: self.num_colours],
        }


def scene_rows(
    count: int,
    seed: int,
    scenes: SceneArguments | None = None,
    questions_per_image: int = 1,
    **changes: Any,
) -> VQADataset:
    """Draws seeded rows about scenes. With one question per image, answers are uniform within a type (for evaluation).

    Args:
        count: number of rows.
        seed: equal seeds draw equal rows.
        scenes: which scenes are drawn; None means the defaults of `SceneArguments`.
        questions_per_image: maximum number of questions per image, of different types as far as possible.
        changes: fields of `scenes` to replace, for example `image_size=32`.

    Raises:
        TypeError: a name in `changes` is no field of `SceneArguments`.
        ValueError: `SceneArguments` refuses a value.
    """
    scenes, rng = _changed(scenes, changes), random.Random(seed)
    if questions_per_image == 1:
        examples = balanced_examples(rng, count, scenes.types, **scenes.sampling())
        return VQADataset([_row(item.scene, item.questions, scenes.image_size) for item in examples])
    drawn = _drawn(count, rng, scenes, questions_per_image)
    return VQADataset([_row(scene, questions, scenes.image_size) for scene, questions in drawn])


def scene_caption_rows(
    count: int, seed: int, questions_per_image: int = 5, scenes: SceneArguments | None = None, **changes: Any
) -> VQADataset:
    """Draws seeded scenes, each with its caption and up to `questions_per_image` questions of different types.

    The arguments and errors are those of `scene_rows`.
    """
    scenes = _changed(scenes, changes)
    drawn = _drawn(count, random.Random(seed), scenes, questions_per_image)
    return VQADataset([_row(scene, questions, scenes.image_size) for scene, questions in drawn])


def _changed(scenes: SceneArguments | None, changes: dict[str, Any]) -> SceneArguments:
    scenes = SceneArguments() if scenes is None else scenes
    unknown = set(changes) - set(vars(scenes))
    if unknown:
        raise TypeError(
            f"SceneArguments has no field {', '.join(sorted(unknown))}; its fields are {', '.join(vars(scenes))}."
        )
    return replace(scenes, **changes)


def _drawn(count: int, rng: random.Random, scenes: SceneArguments, questions_per_image: int):
    """Yields `count` scenes, each with its questions."""
    per_type = -(-questions_per_image // len(scenes.types))
    for _ in range(count):
        scene = sample_scene(rng, **scenes.sampling())
        yield scene, scene_questions(scene, rng, scenes.types, per_type=per_type)[:questions_per_image]


def _row(scene: Scene, questions: Sequence[SceneQuestion], image_size: int) -> dict[str, Any]:
    return {
        "image": render_scene(scene, image_size),
        "questions": [q.question for q in questions],
        "answers": [[q.answer] for q in questions],
        "types": [q.type for q in questions],
        "caption": _spaced_caption(scene),
    }


def _spaced_caption(scene: Scene) -> str:
    """The scene's caption, with a space before each comma, so that commas are words of their own."""
    return scene_caption(scene).replace(",", " ,")
