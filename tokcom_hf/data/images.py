"""Image data sets for training image tokenizers: seeded procedural scenes, a folder, or a Hub data set."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .image_columns import encoded_images, image_bytes
from .image_files import image_files
from .procedural_scene import procedural_scene

__all__ = [
    "FIRST_HELD_OUT",
    "FolderImages",
    "HubImages",
    "ImageDataset",
    "ImageSource",
    "ProceduralImages",
    "RandomCrops",
    "hub_images",
    "image_datasets",
    "image_files",
    "procedural_scene",
]

# Procedural images with seeds from here on are held out in every recipe; no hyperparameter was chosen on them.
FIRST_HELD_OUT = 30_000_000


class ImageDataset(Dataset):
    """Items `{"pixel_values": (channels, height, width)}` in [-1, 1], prepared by an image processor.

    Subclasses implement `load`. Worker processes start with an empty cache. Set `target_processor` for a model whose output
    has other channels than its input; items then also hold the `labels` that this processor makes.

    Args:
        length: number of images.
        processor: `VQGANImageProcessor`.
        cache: keep each prepared image in memory, as uint8, after its first use.
    """

    def __init__(self, length: int, processor, cache: bool = False):
        self.length, self.processor, self.cache = length, processor, cache
        self.target_processor: Any = None
        self._stored: dict[int, torch.Tensor] = {}
        self.skipped: list[str] = []

    def load(self, index: int) -> Any:
        """Returns image `index` in any form that the processor accepts."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"Image {index} of a data set of {self.length} images.")
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
        """Splits the channels of an item into `pixel_values` and, with a `target_processor`, `labels`."""
        if self.target_processor is None:
            return {"pixel_values": pixels}
        channels = self.processor.num_channels
        return {"pixel_values": pixels[:channels], "labels": pixels[channels:]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stored": {}}


class ProceduralImages(ImageDataset):
    """`number` procedural scenes with seeds from `first` on; give training and held-out sets disjoint ranges of seeds."""

    def __init__(self, number: int, processor, first: int = 0):
        super().__init__(number, processor, cache=True)
        self.first = first

    def load(self, index: int) -> Image.Image:
        return procedural_scene(self.first + index, self.processor.image_size)


class FolderImages(ImageDataset):
    """Images of a folder and its subfolders in order of their paths; unreadable files are left out with a warning.

    Symbolic links to folders are followed, each real folder once; names that begin with a dot are left out. With
    `check=True` every file is decoded once at the start, because only decoding finds a truncated file; `skipped` lists the
    paths of the unreadable ones.

    Raises:
        NotADirectoryError: `folder` does not exist or is a file.
        PermissionError: a subfolder cannot be read.
        ValueError: the folder contains no image, or none that can be read.
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


class RandomCrops(Dataset):
    """Seeded square crops from larger images: item i is crop i mod per_image of image i div per_image.

    Args:
        folder: folder of images, as for `FolderImages`.
        processor: `VQGANImageProcessor`; its `image_size` is the side of a crop.
        per_image: number of crops per image.
        scale: factor by which images are resized first; below 1, crops show a larger part of the image.
        images: slice of the sorted files to use, for disjoint training and held-out sets.
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
        processor: `VQGANImageProcessor`.
        column: name of the image column.
        name: name of the data set, for error messages.

    Raises:
        ValueError: the data set has no such column.
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
    """Loads the images of a Hub data set (needs the network unless the data set is cached).

    Raises:
        ValueError: the data set has no such column.
    """
    from datasets import load_dataset

    return HubImages(load_dataset(dataset_name, config, split=split), processor, image_column, dataset_name)


@dataclass(frozen=True)
class ImageSource:
    """Source of training and held-out images: a folder, a Hub data set, or else procedural scenes.

    Args:
        image_dir: folder of training images, as for `FolderImages`.
        val_dir: folder of held-out images; without it every tenth image of `image_dir` or of the data set is held out.
        dataset_name, dataset_config, image_column: a Hub data set, its configuration, and its image column.
        num_train: number of procedural training images.
        num_eval: maximum number of held-out images.

    Raises:
        ValueError: both a folder and a data set are given, a column or a configuration is given without a data set,
            `val_dir` and `image_dir` are the same folder or one contains the other, or a number of images is below 1.
    """

    image_dir: str | None = None
    val_dir: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    image_column: str = "image"
    num_train: int = 4096
    num_eval: int = 512

    def __post_init__(self):
        if self.image_dir and self.dataset_name:
            raise ValueError("Give image_dir or dataset_name, not both.")
        for name, default in (("dataset_config", None), ("image_column", "image")):
            if getattr(self, name) != default and not self.dataset_name:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for a data set on the Hub; name it with dataset_name."
                )
        for name in ("num_train", "num_eval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.image_dir and self.val_dir:
            _check_apart(self.image_dir, self.val_dir)


def image_datasets(processor, source: ImageSource | None = None, target_processor=None) -> tuple[Dataset, Dataset]:
    """Returns disjoint training and held-out images.

    Args:
        processor: `VQGANImageProcessor` of the model's input.
        source: where the images come from; None means procedural images.
        target_processor: `VQGANImageProcessor` of the model's output, if the output has other channels than the input.

    Raises:
        ValueError: fewer than two images to divide, or no image can be read.
        OSError: a folder or data set cannot be read.
    """
    source = ImageSource() if source is None else source
    held_out: ImageDataset | None = None
    if source.val_dir:
        held_out = FolderImages(source.val_dir, processor, cache=True)
        held_out.length = min(len(held_out), source.num_eval)
    if source.image_dir:
        images: ImageDataset = FolderImages(source.image_dir, processor, cache=True)
    elif source.dataset_name:
        column, config = source.image_column, source.dataset_config
        images = hub_images(source.dataset_name, processor, image_column=column, config=config)
    else:
        images = ProceduralImages(source.num_train, processor)
        if held_out is None:
            held_out = ProceduralImages(source.num_eval, processor, first=FIRST_HELD_OUT)
    images.target_processor = target_processor
    if held_out is not None:
        held_out.target_processor = target_processor
        return images, held_out
    if len(images) < 2:
        raise ValueError(f"At least two images are needed, one to train on and one to hold out; got {len(images)}.")
    held = set(range(0, len(images), 10)[: source.num_eval]) if len(images) > 10 else {0}
    kept = [index for index in range(len(images)) if index not in held]
    return torch.utils.data.Subset(images, kept), torch.utils.data.Subset(images, sorted(held))


def _check_apart(image_dir: str, val_dir: str) -> None:
    """Raises ValueError if the two folders are the same or one contains the other: held-out images would be trained on."""
    train, held_out = Path(image_dir).resolve(), Path(val_dir).resolve()
    if train == held_out or train in held_out.parents or held_out in train.parents:
        raise ValueError(
            f"val_dir {val_dir!r} and image_dir {image_dir!r} share images: they are the same folder, or one contains the "
            "other. Name two separate folders, or leave val_dir out, which holds out every tenth image of image_dir."
        )
