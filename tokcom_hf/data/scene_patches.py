"""Procedural scenes with a label for every patch: dense supervision that trains a small vision tower within a minute."""

import random
from typing import Any

import numpy as np
import torch

from .scenes import _DETAIL_COLOURS, COLOURS, SHAPES, SIZES, Scene, render_scene, sample_scene


def patch_label_sizes(side: int) -> dict[str, int]:
    """Number of classes of each label of a patch; class 0 means "no object" (for `dot`: "no dot") in the first four."""
    return {
        "shape": 1 + len(SHAPES),
        "colour": 1 + len(COLOURS),
        "size": 1 + len(SIZES),
        "dot": 1 + len(_DETAIL_COLOURS),
        "row": side,
        "column": side,
    }


def patch_labels(scene: Scene, side: int) -> torch.Tensor:
    """Labels `side` × `side` patches of a scene; all patches of a grid cell get the same object labels.

    Returns:
        Classes `(side², 6)`, int64, in the order of `patch_label_sizes`; patches in reading order.

    Raises:
        ValueError: `side` is no multiple of the scene's grid.
    """
    if side % scene.grid:
        raise ValueError(
            f"{side}×{side} patches cannot be divided among {scene.grid}×{scene.grid} cells; choose image_size, patch_size "
            "and grid so that every cell holds whole patches."
        )
    width = side // scene.grid
    labels = torch.zeros(side, side, 6, dtype=torch.long)
    labels[..., 4] = torch.arange(side)[:, None]
    labels[..., 5] = torch.arange(side)
    dots = list(_DETAIL_COLOURS)
    for item in scene.objects:
        rows = slice(item.row * width, (item.row + 1) * width)
        columns = slice(item.column * width, (item.column + 1) * width)
        classes = [SHAPES.index(item.shape), list(COLOURS).index(item.colour), SIZES.index(item.size)]
        classes.append(-1 if item.dot is None else dots.index(item.dot))
        labels[rows, columns, :4] = torch.tensor(classes) + 1
    return labels.flatten(0, 1)


class ScenePatchDataset(torch.utils.data.Dataset):
    """`count` seeded scenes as `{"pixel_values": (3, size, size), "patch_labels": (side², 6)}`, drawn when read.

    Args:
        count: scenes per epoch.
        seed: seed of the data set; item `i` depends on `seed` and `i` alone.
        image_processor: gives `image_mean` and `image_std`; no resizing is needed, because images are drawn in the
            tower's input size.
        image_size: pixels per side of the drawn image.
        side: patches (or features) per side that the tower returns.
        **scene_options: arguments of `sample_scene`.
    """

    def __init__(self, count: int, seed: int, image_processor, image_size: int, side: int, **scene_options: Any):
        self.count, self.seed = count, seed
        self.mean = torch.tensor(image_processor.image_mean)[:, None, None]
        self.std = torch.tensor(image_processor.image_std)[:, None, None]
        self.image_size, self.side, self.scene_options = image_size, side, scene_options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = sample_scene(random.Random(f"patches {self.seed} {index}"), **self.scene_options)
        image = torch.from_numpy(np.asarray(render_scene(scene, self.image_size)).copy())
        pixels = image.permute(2, 0, 1).float() / 255
        return {"pixel_values": (pixels - self.mean) / self.std, "patch_labels": patch_labels(scene, self.side)}
