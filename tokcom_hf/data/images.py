"""Images to learn codes from: seeded procedural scenes, a folder, or a Hub data set."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import Dataset

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Procedural images from this seed on are held out of every recipe, and no setting was chosen on them.
FIRST_HELD_OUT = 30_000_000
GLYPHS = "ABCDEFGHKLMNPRSTUVXYZabdefghkmnpqrstuy0123456789&?#%"


def procedural_scene(seed: int, size: int = 64) -> Image.Image:
    """Draws one RGB scene: a gradient or texture, some shapes, perhaps text; equal seeds draw equal pixels."""
    random = np.random.default_rng((20_240, seed))
    canvas = 2 * size
    image = Image.fromarray(_background(random, canvas))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(2, 7)):
        _shape(draw, random, canvas)
    if random.random() < 0.5:
        text = "".join(random.choice(list(GLYPHS), random.integers(1, 5)))
        font = ImageFont.load_default(size=float(random.uniform(0.15, 0.45) * canvas))
        place = tuple(random.uniform(0.0, 0.7, 2) * canvas)
        draw.text(place, text, fill=_colour(random), font=font)
    if random.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.5, 2.0))))
    return image.resize((size, size), Image.Resampling.BOX)


def _colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in random.integers(0, 256, 3))


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    angle, first, second = random.uniform(0, 2 * np.pi), random.integers(0, 256, 3), random.integers(0, 256, 3)
    along = np.cos(angle) * x + np.sin(angle) * y
    kind = random.integers(5)
    if kind == 0:  # linear gradient
        level = (along - along.min()) / (np.ptp(along) + 1e-9)
    elif kind == 1:  # stripes
        level = (np.sin(along * random.uniform(8, 60)) > random.uniform(-0.5, 0.5)).astype(float)
    elif kind == 2:  # checkerboard
        squares = random.integers(2, 10)
        level = ((x * squares).astype(int) + (y * squares).astype(int)) % 2
    elif kind == 3:  # radial gradient
        level = np.clip(np.hypot(x - random.random(), y - random.random()) * random.uniform(0.8, 2.0), 0, 1)
    else:  # clouds: octaves of interpolated noise
        level = np.zeros((size, size))
        for octave in range(1, 5):
            cells = (random.random((2**octave + 1, 2**octave + 1)) * 255).astype(np.uint8)
            smooth = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
            level += np.asarray(smooth) / 255.0 / 2**octave
        level = (level - level.min()) / (np.ptp(level) + 1e-9)
    pixels = first + (second - first) * np.asarray(level, dtype=float)[..., None]
    return (pixels + random.normal(0, random.uniform(0, 6), pixels.shape)).clip(0, 255).astype(np.uint8)


def _shape(draw: ImageDraw.ImageDraw, random: np.random.Generator, size: int) -> None:
    centre, radius = random.uniform(0, 1, 2) * size, random.uniform(0.05, 0.35) * size
    fill, kind = _colour(random), random.integers(4)
    if kind == 0:
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=fill)
    elif kind == 3:
        ends = [tuple(centre), tuple(random.uniform(0, 1, 2) * size)]
        draw.line(ends, fill=fill, width=int(random.uniform(0.01, 0.08) * size) + 1)
    else:
        corners = int(random.integers(3, 7)) if kind == 1 else 4
        turn = random.uniform(0, 2 * np.pi)
        angles = turn + np.arange(corners) * 2 * np.pi / corners
        points = [tuple(centre + radius * np.array([np.cos(angle), np.sin(angle)])) for angle in angles]
        draw.polygon(points, fill=fill)


class ImageDataset(Dataset):
    """Items `{"pixel_values": (channels, height, width)}` in [-1, 1], prepared by an image processor.

    Args:
        load: index → anything the processor takes.
        length: number of images.
        processor: `VQGANImageProcessor`.
        cache: keep prepared images as bytes after their first use.
    """

    def __init__(self, load: Callable[[int], Any], length: int, processor, cache: bool = False):
        self.load, self.length, self.processor, self.cache = load, length, processor, cache
        self._stored: dict[int, torch.Tensor] = {}
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"Image {index} of {self.length}.")
        index %= self.length
        if index in self._stored:
            return {"pixel_values": self._stored[index].float() / 127.5 - 1.0}
        pixels = self.processor(self.load(index))["pixel_values"][0]
        if self.cache:
            self._stored[index] = ((pixels + 1) * 127.5).round().byte()
        return {"pixel_values": pixels}


class ProceduralImages(ImageDataset):
    """`number` seeded scenes; training and held-out sets take disjoint ranges of seeds through `first`."""

    def __init__(self, number: int, processor, first: int = 0):
        self.first = first
        super().__init__(lambda index: procedural_scene(first + index, processor.image_size), number, processor, True)


class FolderImages(ImageDataset):
    """Images of a folder and its subfolders in order of their paths; unreadable files are left out and counted.

    `skipped` lists the paths left out. Every file is decoded once at the start (`check=True`), because a truncated file
    is only found by decoding it.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: no image in it, or none that can be read.
    """

    def __init__(self, folder: str | Path, processor, check: bool = True, cache: bool = False):
        folder = Path(folder)
        if not folder.is_dir():
            raise NotADirectoryError(f"Image folder {str(folder)!r} does not exist or is not a folder.")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not files:
            raise ValueError(f"No images in {str(folder)!r}; looked for {', '.join(sorted(EXTENSIONS))}.")
        skipped = [str(path) for path in files if check and not _readable(path, processor)]
        self.files = [path for path in files if str(path) not in set(skipped)]
        if not self.files:
            raise ValueError(f"None of the {len(files)} images in {str(folder)!r} can be read.")
        if skipped:
            warnings.warn(
                f"Skipped {len(skipped)} of {len(files)} images that cannot be read: {skipped[:5]}.", stacklevel=2
            )
        super().__init__(lambda index: str(self.files[index]), len(self.files), processor, cache)
        self.skipped = skipped


def _readable(path: Path, processor) -> bool:
    try:
        processor.to_pil(str(path))
    except ValueError:
        return False
    return True


class RandomCrops(Dataset):
    """Seeded crops of `size` from larger images: item i is crop i mod per_image of image i div per_image.

    Args:
        folder: images, as for `FolderImages`.
        processor: makes the pixels; its `image_size` is the crop's size.
        per_image: crops of each image.
        scale: images are first shrunk by this factor, so that crops show more.
        images: which of the sorted files to use, for disjoint training and held-out sets.
    """

    def __init__(self, folder: str | Path, processor, per_image: int, scale: float = 1.0, images: slice = slice(None)):
        files = FolderImages(folder, processor).files[images]
        self.arrays = []
        for path in files:
            image = processor.to_pil(str(path))
            side = processor.image_size
            shape = [max(side, round(length * scale)) for length in image.size]
            self.arrays.append(np.asarray(image.resize(shape, Image.Resampling.BICUBIC)))
        self.processor, self.per_image = processor, per_image

    def __len__(self) -> int:
        return len(self.arrays) * self.per_image

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        array, side = self.arrays[index // self.per_image], self.processor.image_size
        random = np.random.default_rng((7, index))
        top, left = (random.integers(0, length - side + 1) for length in array.shape[:2])
        return {"pixel_values": self.processor(array[top : top + side, left : left + side])["pixel_values"][0]}


def hub_images(
    dataset_name: str, processor, split: str = "train", image_column: str = "image", config: str | None = None
) -> ImageDataset:
    """Images of a Hub data set (needs the network unless it is cached).

    Raises:
        ValueError: the data set has no such column.
    """
    from datasets import load_dataset

    rows = load_dataset(dataset_name, config, split=split)
    if image_column not in rows.column_names:
        raise ValueError(f"{dataset_name} has no column {image_column!r}; it has {', '.join(rows.column_names)}.")
    return ImageDataset(lambda index: rows[index][image_column], len(rows), processor)


def image_datasets(
    processor,
    image_dir: str | None = None,
    dataset_name: str | None = None,
    num_train: int = 4096,
    num_eval: int = 512,
    image_column: str = "image",
    dataset_config: str | None = None,
) -> tuple[Dataset, Dataset]:
    """Training and held-out images that share none: procedural by default, else a folder or a Hub data set.

    Of a folder or data set every tenth image, at most `num_eval`, is held out.

    Raises:
        ValueError: both sources are named, or fewer than two images are there.
    """
    if image_dir and dataset_name:
        raise ValueError("Give image_dir or dataset_name, not both.")
    if not image_dir and not dataset_name:
        held_out = ProceduralImages(num_eval, processor, first=FIRST_HELD_OUT)
        return ProceduralImages(num_train, processor), held_out
    if image_dir:
        images: ImageDataset = FolderImages(image_dir, processor, cache=True)
    else:
        images = hub_images(str(dataset_name), processor, image_column=image_column, config=dataset_config)
    if len(images) < 2:
        raise ValueError(f"At least two images are needed, to train on and to hold out; got {len(images)}.")
    held = set(range(0, len(images), 10)[:num_eval]) if len(images) > 10 else {0}
    kept = [index for index in range(len(images)) if index not in held]
    return torch.utils.data.Subset(images, kept), torch.utils.data.Subset(images, sorted(held))
