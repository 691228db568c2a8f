"""Seeded procedural scenes: coloured shapes on a jittered grid, with a caption and questions with balanced answers.

    rng = random.Random(0)
    scene = sample_scene(rng)
    image = render_scene(scene, image_size=64)          # PIL.Image, RGB
    caption = scene_caption(scene)                      # "a small red circle at the top left and ..."
    questions = scene_questions(scene, rng)             # one per question type that the scene supports
    examples = balanced_examples(rng, 1000)             # type and answer are drawn first: answers are uniform

Everything is a function of the `random.Random` passed in, so one seed gives one data set on every machine.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
}
SIZES = ("small", "large")
BACKGROUNDS = ((24, 24, 28), (60, 62, 70), (200, 200, 196), (228, 226, 220))
QUESTION_TYPES = ("count", "colour", "shape", "relation", "detail")
MAX_COUNT = 3
_DETAIL_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "pink": (255, 120, 200), "cyan": (0, 230, 230)}
_OVERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One shape in one grid cell; `dot` is the colour name of a small dot drawn on it, or None."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    shift: tuple[float, float] = (0.0, 0.0)
    dot: str | None = None


@dataclass(frozen=True)
class Scene:
    """Objects in distinct cells of a `grid` × `grid` board on a plain `background` (RGB, 0-255)."""

    objects: tuple[SceneObject, ...]
    grid: int
    background: tuple[int, int, int]


@dataclass(frozen=True)
class SceneQuestion:
    """A question, its one-word answer and its type (one of `QUESTION_TYPES`)."""

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class SceneExample:
    """One scene with one or more questions about it."""

    scene: Scene
    questions: tuple[SceneQuestion, ...]


def sample_scene(
    rng: random.Random,
    min_objects: int = 2,
    max_objects: int = 6,
    grid: int = 4,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = tuple(COLOURS),
) -> Scene:
    """Draws a scene; exactly one object carries a dot.

    Args:
        rng: source of all randomness.
        min_objects, max_objects: inclusive range of the number of objects, each in its own cell.
        grid: cells per side.
        shapes, colours: names to draw from, subsets of `SHAPES` and `COLOURS`.

    Raises:
        ValueError: a range that does not fit the grid, or an unknown shape or colour.
    """
    if not 1 <= min_objects <= max_objects <= grid * grid:
        raise ValueError(
            f"A {grid}×{grid} grid holds 1 to {grid * grid} objects, got min_objects={min_objects}, "
            f"max_objects={max_objects}."
        )
    unknown = [name for name in (*shapes, *colours) if name not in SHAPES and name not in COLOURS]
    if unknown or not shapes or not colours:
        raise ValueError(f"Unknown shapes or colours {unknown}; shapes are {SHAPES}, colours {tuple(COLOURS)}.")
    count = rng.randint(min_objects, max_objects)
    cells = rng.sample(range(grid * grid), count)
    # Drawing colours and shapes from random sub-palettes makes repeated attributes (counts of 2 and 3) common.
    palette = rng.sample(list(colours), rng.randint(min(2, len(colours)), len(colours)))
    forms = rng.sample(list(shapes), rng.randint(min(2, len(shapes)), len(shapes)))
    dotted = rng.randrange(count)
    objects = tuple(
        SceneObject(
            shape=rng.choice(forms),
            colour=rng.choice(palette),
            size=rng.choice(SIZES),
            row=cell // grid,
            column=cell % grid,
            shift=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
            dot=rng.choice(list(_DETAIL_COLOURS)) if index == dotted else None,
        )
        for index, cell in enumerate(cells)
    )
    background = rng.choice(BACKGROUNDS)
    return Scene(objects=objects, grid=grid, background=background)


def render_scene(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws the scene as an antialiased RGB image of `image_size` × `image_size` pixels."""
    side = image_size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    cell = side / scene.grid
    for item in scene.objects:
        radius = cell * (0.44 if item.size == "large" else 0.34)
        slack = cell / 2 - radius
        x = (item.column + 0.5) * cell + item.shift[0] * slack
        y = (item.row + 0.5) * cell + item.shift[1] * slack
        _draw_shape(draw, item.shape, COLOURS[item.colour], x, y, radius, scene.background)
        if item.dot is not None:
            dot = cell * 0.15
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=_DETAIL_COLOURS[item.dot])
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_shape(draw, shape: str, colour, x: float, y: float, r: float, background) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=background)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], fill=colour)
    else:
        bar = 0.32 * r
        draw.rectangle((x - bar, y - r, x + bar, y + r), fill=colour)
        draw.rectangle((x - r, y - bar, x + r, y + bar), fill=colour)


def scene_caption(scene: Scene) -> str:
    """Describes every object in reading order: `a small red circle at the top left and a large ...`."""
    phrases = []
    for item in sorted(scene.objects, key=lambda o: (o.row, o.column)):
        dot = f" with a {item.dot} dot" if item.dot else ""
        phrases.append(f"a {item.size} {item.colour} {item.shape}{dot} at the {_place(item, scene.grid)}")
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _place(item: SceneObject, grid: int) -> str:
    third = lambda index, names: names[min(2, int(3 * (index + 0.5) / grid))]  # noqa: E731
    vertical = third(item.row, ("top", "middle", "bottom"))
    horizontal = third(item.column, ("left", "middle", "right"))
    return vertical if horizontal == "middle" else f"{vertical} {horizontal}"


def _candidates(scene: Scene, kind: str, rng: random.Random) -> list[SceneQuestion]:
    """Every question of one type that the scene answers without ambiguity."""
    objects = scene.objects
    shape_count = {name: sum(o.shape == name for o in objects) for name in SHAPES}
    colour_count = {name: sum(o.colour == name for o in objects) for name in COLOURS}
    found: list[tuple[str, str]] = []
    if kind == "count":
        # `balanced_examples` asks about colours and shapes equally often for every answer: the wording gives nothing away.
        names = [(f"{name}s" if name != "cross" else "crosses", n) for name, n in shape_count.items()]
        names += [(f"{name} objects", n) for name, n in colour_count.items()]
        found = [(f"how many {name} are there ?", str(n)) for name, n in names if n <= MAX_COUNT]
    elif kind == "colour":
        found = [(f"what colour is the {o.shape} ?", o.colour) for o in objects if shape_count[o.shape] == 1]
    elif kind == "shape":
        found = [(f"what shape is the {o.colour} object ?", o.shape) for o in objects if colour_count[o.colour] == 1]
    elif kind == "relation":
        found = [(f"what shape is the {word} object ?", o.shape) for word, o in _outermost(objects)]
    elif kind == "detail":
        found = [("what colour is the dot ?", o.dot) for o in objects if o.dot]
    else:
        raise ValueError(f"Unknown question type {kind!r}; types are {QUESTION_TYPES}.")
    return [SceneQuestion(question, answer, kind) for question, answer in found]


def _outermost(objects: Sequence[SceneObject]) -> Iterator[tuple[str, SceneObject]]:
    """Yields the objects that lie farther to one side than all others; the answer needs a comparison of positions."""
    columns, rows = (lambda o: o.column), (lambda o: o.row)
    ends = {"leftmost": (min, columns), "rightmost": (max, columns), "topmost": (min, rows), "bottommost": (max, rows)}
    for word, (extreme, place) in ends.items():
        edge = extreme(map(place, objects))
        at = [o for o in objects if place(o) == edge]
        if len(at) == 1 < len(objects):
            yield word, at[0]


def possible_answers(kind: str) -> tuple[str, ...]:
    """Returns all possible answers of a question type; guessing scores one over their number."""
    if kind == "count":
        return tuple(str(n) for n in range(MAX_COUNT + 1))
    answers: dict[str, tuple[str, ...]] = {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "relation": SHAPES,
        "detail": tuple(_DETAIL_COLOURS),
    }
    return answers[kind]


def scene_questions(
    scene: Scene, rng: random.Random, types: Sequence[str] = QUESTION_TYPES, per_type: int = 1
) -> list[SceneQuestion]:
    """Draws up to `per_type` questions of each type, in random order.

    Within a type, each answer that the scene offers is drawn with equal probability.
    """
    chosen: list[SceneQuestion] = []
    for kind in types:
        pool = _candidates(scene, kind, rng)
        rng.shuffle(pool)
        for _ in range(min(per_type, len(pool))):
            answer = rng.choice(sorted({q.answer for q in pool}))
            question = next(q for q in pool if q.answer == answer)
            pool.remove(question)
            chosen.append(question)
    rng.shuffle(chosen)
    return chosen


def balanced_examples(
    rng: random.Random, count: int, types: Sequence[str] = QUESTION_TYPES, **scene_options
) -> Iterator[SceneExample]:
    """Yields `count` one-question examples: draws type and answer first, then scenes until one fits.

    `sample_scene` treats all colours alike and all shapes alike, so the answers to every question text are uniform, as they
    are within its type. A model that ignores the image scores at chance: one over the number of possible answers, which
    `shapes` and `colours` in `scene_options` may restrict.
    """
    for index in range(count):
        kind = types[index % len(types)]
        answers = [a for a in possible_answers(kind) if _allowed(a, kind, scene_options)]
        answer = answers[rng.randrange(len(answers))]
        of_shape = rng.random() < 0.5
        while True:
            scene = sample_scene(rng, **scene_options)
            pool = [q for q in _candidates(scene, kind, rng) if q.answer == answer]
            if kind == "count":
                pool = [q for q in pool if ("objects" not in q.question) == of_shape]
                pool = [q for q in pool if _asked_word_allowed(q.question, scene_options)]
            if pool:
                yield SceneExample(scene, (rng.choice(pool),))
                break


def _allowed(answer: str, kind: str, options: dict) -> bool:
    names = {"colour": "colours", "shape": "shapes", "relation": "shapes"}.get(kind)
    return names is None or answer in options.get(names, (answer,))


def _asked_word_allowed(question: str, options: dict) -> bool:
    word = question.split()[2]
    word = word if word in COLOURS else "cross" if word == "crosses" else word.removesuffix("s")
    return word in options.get("colours", COLOURS) or word in options.get("shapes", SHAPES)
