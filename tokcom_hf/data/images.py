"""Images to learn codes from: seeded procedural scenes, a folder, or a Hub data set."""

import io
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..models.shared_image_files import SUFFIXES
from .image_columns import encoded_images, image_bytes

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

    Subclasses say in `load` where images come from. Worker processes get no copy of the cache. Where `target_processor` is
    set, for a model whose output has other channels than its input, items hold `labels` too, as that processor makes them.

    Args:
        length: number of images.
        processor: `VQGANImageProcessor`.
        cache: keep prepared images as bytes after their first use.
    """

    def __init__(self, length: int, processor, cache: bool = False):
        self.length, self.processor, self.cache = length, processor, cache
        self.target_processor: Any = None
        self._stored: dict[int, torch.Tensor] = {}
        self.skipped: list[str] = []

    def load(self, index: int) -> Any:
        """Image `index` as anything the processor takes."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"Image {index} of {self.length}.")
        index %= self.length
        if index in self._stored:
            return self._named(self._stored[index].float() / 127.5 - 1.0)
        image = self.load(index)
        pixels = self.processor(image)["pixel_values"][0]
        if self.target_processor is not None:
            pixels = torch.cat([pixels, self.target_processor(image)["pixel_values"][0]])
        if self.cache:
            self._stored[index] = ((pixels + 1) * 127.5).round().byte()
        return self._named(pixels)

    def _named(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Splits the channels of an item into those of the input and those of the target."""
        if self.target_processor is None:
            return {"pixel_values": pixels}
        channels = self.processor.num_channels
        return {"pixel_values": pixels[:channels], "labels": pixels[channels:]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stored": {}}


class ProceduralImages(ImageDataset):
    """`number` seeded scenes; training and held-out sets take disjoint ranges of seeds through `first`."""

    def __init__(self, number: int, processor, first: int = 0):
        super().__init__(number, processor, cache=True)
        self.first = first

    def load(self, index: int) -> Image.Image:
        return procedural_scene(self.first + index, self.processor.image_size)


class FolderImages(ImageDataset):
    """Images of a folder and its subfolders in order of their paths; unreadable files are left out and counted.

    Subfolders that are symbolic links are followed, each real folder once; names that begin with a dot are left out.
    `skipped` lists the paths left out. Every file is decoded once at the start (`check=True`), because a truncated file
    is only found by decoding it.

    Raises:
        NotADirectoryError: no such folder.
        PermissionError: a subfolder that cannot be read.
        ValueError: no image in it, or none that can be read.
    """

    def __init__(self, folder: str | Path, processor, check: bool = True, cache: bool = False):
        files = image_files(folder)
        skipped = set()
        for path in tqdm(files if check else [], "reading images", delay=2, leave=False):
            try:
                processor.to_pil(str(path))
            except ValueError:
                skipped.add(path)
        self.files = [path for path in files if path not in skipped]
        if not self.files:
            raise ValueError(f"None of the {len(files)} images in {str(folder)!r} can be read.")
        super().__init__(len(self.files), processor, cache)
        self.skipped = [str(path) for path in files if path in skipped]
        if skipped:
            warnings.warn(
                f"Skipped {len(skipped)} of {len(files)} images that cannot be read: {self.skipped[:5]}.", stacklevel=2
            )

    def load(self, index: int) -> str:
        return str(self.files[index])


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder and its subfolders (by their suffix, in any case), sorted.

    Symbolic links to folders are followed; a real folder that is reached twice, through a circle of links for example,
    counts once. Names that begin with a dot are left out: previews, checkpoints of notebooks, the `._` files of macOS.

    Raises:
        NotADirectoryError: no such folder, or a file.
        PermissionError: a subfolder that cannot be read.
        ValueError: no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist or is not a folder"
        raise NotADirectoryError(f"Image folder {str(folder)!r} {state}.")
    files, others, dangling, seen = [], Counter[str](), [], set()
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Real folders before links, so that a folder keeps its own name where a link beside it leads to it.
        folders[:] = sorted(
            (name for name in folders if name[0] != "."), key=lambda name: (os.path.islink(Path(root, name)), name)
        )
        for name in names:
            path, suffix = Path(root, name), Path(name).suffix.lower()
            if name[0] == ".":
                continue
            if not path.exists():
                dangling.append(str(path))
            elif path.is_file() and suffix in SUFFIXES:
                files.append(path)
            else:
                others[suffix or "no suffix"] += 1
    if dangling:
        warnings.warn(f"{len(dangling)} links in {str(folder)!r} lead nowhere: {sorted(dangling)[:5]}.", stacklevel=2)
    if not files:
        found = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise ValueError(f"No images in {str(folder)!r}; looked for {', '.join(SUFFIXES)}, found {found}.")
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


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


class HubImages(ImageDataset):
    """Images of a column of a `datasets.Dataset`.

    Args:
        rows: the data set.
        column: its column of images.
        name: of the data set, for errors.

    Raises:
        ValueError: no such column.
    """

    def __init__(self, rows, processor, column: str = "image", name: str = "data set"):
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.")
        super().__init__(len(rows), processor)
        self.rows, self.column, self.name = encoded_images(rows, (column,)), column, name

    def load(self, index: int) -> Any:
        image = image_bytes(self.rows[index][self.column], f"{self.name}, row {index}")
        try:
            return self.processor.to_pil(io.BytesIO(image) if isinstance(image, bytes) else image)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}, row {index}: {error}") from error


def hub_images(
    dataset_name: str, processor, split: str = "train", image_column: str = "image", config: str | None = None
) -> HubImages:
    """Images of a Hub data set (needs the network unless it is cached).

    Raises:
        ValueError: the data set has no such column.
    """
    from datasets import load_dataset

    return HubImages(load_dataset(dataset_name, config, split=split), processor, image_column, dataset_name)


def image_datasets(
    processor,
    image_dir: str | None = None,
    dataset_name: str | None = None,
    num_train: int = 4096,
    num_eval: int = 512,
    image_column: str = "image",
    dataset_config: str | None = None,
    val_dir: str | None = None,
    target_processor=None,
) -> tuple[Dataset, Dataset]:
    """Training and held-out images that share none: procedural by default, else a folder or a Hub data set.

    Held out are the images of `val_dir`, or else every tenth image of the folder or data set; at most `num_eval` of them.

    Raises:
        ValueError: both sources are named, `val_dir` is the training folder, lies in it or holds it, or fewer than two
            images are there.
    """
    if image_dir and dataset_name:
        raise ValueError("Give image_dir or dataset_name, not both.")
    held_out: ImageDataset | None = None
    if val_dir:
        _check_apart(image_dir, val_dir)
        held_out = FolderImages(val_dir, processor, cache=True)
        held_out.length = min(len(held_out), num_eval)
    if image_dir:
        images: ImageDataset = FolderImages(image_dir, processor, cache=True)
    elif dataset_name:
        images = hub_images(dataset_name, processor, image_column=image_column, config=dataset_config)
    else:
        images = ProceduralImages(num_train, processor)
        held_out = ProceduralImages(num_eval, processor, first=FIRST_HELD_OUT) if held_out is None else held_out
    images.target_processor = target_processor
    if held_out is not None:
        held_out.target_processor = target_processor
        return images, held_out
    if len(images) < 2:
        raise ValueError(f"At least two images are needed, to train on and to hold out; got {len(images)}.")
    held = set(range(0, len(images), 10)[:num_eval]) if len(images) > 10 else {0}
    kept = [index for index in range(len(images)) if index not in held]
    return torch.utils.data.Subset(images, kept), torch.utils.data.Subset(images, sorted(held))


def _check_apart(image_dir: str | None, val_dir: str) -> None:
    """Raises where one of two folders is or holds the other, so that images would be trained on and held out."""
    if image_dir is None:
        return
    train, held_out = Path(image_dir).resolve(), Path(val_dir).resolve()
    if train == held_out or train in held_out.parents or held_out in train.parents:
        raise ValueError(
            f"val_dir {val_dir!r} and image_dir {image_dir!r} share images: one is the other or lies in it. Name two "
            "separate folders, or leave val_dir out, which holds out every tenth image of image_dir."
        )
