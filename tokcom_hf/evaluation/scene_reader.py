"""Recognises the objects of procedural scenes in pixels, to check whether a generated image matches its caption.

    reader = SceneReader(image_size=48, grid=3)
    found = reader.read(image)                      # {(row, column): (shape, colour), ...}
    score_scene(scene, found)                       # {"shape_and_colour": True, "place": True, ...}

No neural network is involved: every cell is matched with renderings of all possible objects and of an empty cell.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, SceneObject, possible_answers, render_scene

_SHIFTS = (-0.75, -0.25, 0.25, 0.75)


class SceneReader:
    """Finds the objects of scenes drawn by `data.scenes.render_scene`.

    Args:
        image_size: pixels per side of the images, a multiple of `grid`.
        grid: cells per side.
        shapes, colours: possible shapes and colours of objects.

    Raises:
        ValueError: `image_size` is no multiple of `grid`.
    """

    def __init__(
        self, image_size: int, grid: int, shapes: Sequence[str] = SHAPES, colours: Sequence[str] = tuple(COLOURS)
    ):
        if image_size % grid:
            raise ValueError(f"image_size {image_size} must be a multiple of grid {grid}.")
        self.image_size, self.grid, self.cell = image_size, grid, image_size // grid
        self._items = list(self._candidates(shapes, colours))
        self.labels = [None if item is None else (item.shape, item.colour) for item in self._items]
        self._templates: dict[int, np.ndarray] = {}

    def _renderings(self, background: int) -> np.ndarray:
        """Returns renderings of all candidates on one background, `(candidates, pixels)` float32; they are drawn once."""
        if background not in self._templates:
            scenes = (Scene(() if item is None else (item,), 1, BACKGROUNDS[background]) for item in self._items)
            drawn = [np.asarray(render_scene(scene, self.cell), dtype=np.float32).ravel() for scene in scenes]
            self._templates[background] = np.stack(drawn)
        return self._templates[background]

    @staticmethod
    def _candidates(shapes, colours):
        yield None
        for shape in shapes:
            for colour in colours:
                for size in SIZES:
                    for dot in (None, *possible_answers("detail")):
                        for x in _SHIFTS:
                            for y in _SHIFTS:
                                yield SceneObject(shape, colour, size, 0, 0, (x, y), dot)

    def read(self, image: Image.Image) -> dict[tuple[int, int], tuple[str, str]]:
        """Returns `(row, column) → (shape, colour)` for every cell that is not empty.

        Raises:
            ValueError: the image has another size.
        """
        if image.size != (self.image_size, self.image_size):
            raise ValueError(f"Expected {self.image_size} × {self.image_size} pixels, got {image.size}.")
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        # Objects cover less than half of an image, so its median colour is the background.
        median = np.median(pixels.reshape(-1, 3), axis=0)
        nearest = int(np.argmin([np.abs(median - np.array(colour)).sum() for colour in BACKGROUNDS]))
        templates = self._renderings(nearest)
        side, cell = self.grid, self.cell
        cells = pixels.reshape(side, cell, side, cell, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
        # Squared distance without the term that is the same for all templates.
        distance = (templates**2).sum(1) - 2 * cells @ templates.T
        best = [self.labels[index] for index in distance.argmin(1)]
        return {divmod(place, side): label for place, label in enumerate(best) if label is not None}


def score_scene(scene: Scene, found: dict[tuple[int, int], tuple[str, str]]) -> dict[str, bool]:
    """Compares a scene with the objects found in an image.

    Returns:
        shape_and_colour: the objects are exactly those of the scene, in any cells.
        place: in addition, each object is in its cell.
        shape, colour: the shapes alone, or the colours alone, are right.
    """
    wanted = {(item.row, item.column): (item.shape, item.colour) for item in scene.objects}
    return {
        "shape_and_colour": Counter(wanted.values()) == Counter(found.values()),
        "place": wanted == found,
        "shape": Counter(shape for shape, _ in wanted.values()) == Counter(shape for shape, _ in found.values()),
        "colour": Counter(c for _, c in wanted.values()) == Counter(c for _, c in found.values()),
    }
