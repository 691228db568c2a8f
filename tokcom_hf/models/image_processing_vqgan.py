"""Images of any kind to the pixel tensors of `VQGAN`, and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .shared_image_files import read_image
from .shared_image_pixels import CHANNELS

# Keys of a saved processor that are no arguments of its constructor.
FILED = ("auto_map", "custom_pipelines", "feature_extractor_type", "image_processor_type", "processor_class")


class VQGANImageProcessor(BaseImageProcessor):
    """Converts, resizes and scales images to [-1, 1].

    EXIF rotation is applied. CMYK, palette and grey images are converted. Transparency is laid on white where the model has
    no alpha channel. The first of several pages or frames is taken. Samples of 16 bits, 32 bits and floats are scaled to 8
    bits as `shared_image_pixels.to_uint8` describes.

    Args:
        image_size: side of the square output in pixels (`resize_mode` `crop` and `squash`).
        num_channels: 1 to 4 (grey, grey + alpha, RGB, RGBA).
        resize_mode: `crop` scales the shorter side and cuts out the centre; `squash` changes the aspect ratio; `none` keeps
            the size, cut to a multiple of `size_divisor`.
        size_divisor: sides of the output are multiples of this number, the model's `downsample_factor`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 256,
        num_channels: int = 3,
        resize_mode: str = "crop",
        size_divisor: int = 8,
        **kwargs,
    ):
        unknown = sorted(name for name in kwargs if name not in FILED and not name.startswith("_"))
        if unknown:
            raise TypeError(f"VQGANImageProcessor does not take {', '.join(map(repr, unknown))}.")
        super().__init__(**kwargs)
        if resize_mode not in ("crop", "squash", "none"):
            raise ValueError(f"resize_mode must be crop, squash or none, got {resize_mode!r}.")
        if num_channels not in CHANNELS:
            raise ValueError(f"num_channels must be 1 to 4, got {num_channels}.")
        if image_size < 1 or image_size % size_divisor:
            raise ValueError(f"image_size must be a positive multiple of {size_divisor}, got {image_size}.")
        self.image_size = image_size
        self.num_channels = num_channels
        self.resize_mode = resize_mode
        self.size_divisor = size_divisor

    def __call__(  # type: ignore[override]  # `changes` are checked here; transformers lists them in its signature
        self, images, return_tensors: str | None = "pt", **changes
    ) -> BatchFeature:
        """One image or several (PIL, path, array or tensor) → `pixel_values (batch, num_channels, height, width)`.

        Args:
            images: an image, a list of images, or an array or tensor with a batch dimension. Arrays are
                `(height, width[, channels])`, tensors `(channels, height, width)`; `shared_image_pixels.to_uint8` lists the
                sample types and their ranges.
            changes: arguments of the constructor, for this call only.

        Raises:
            TypeError: something is not an image, or a keyword is unknown.
            ValueError: an image is empty or unreadable, the range of its samples is unclear, or images differ in size with
                `resize_mode="none"`.
        """
        if changes:
            own = {name: getattr(self, name) for name in ("image_size", "num_channels", "resize_mode", "size_divisor")}
            return type(self)(**own | changes)(images, return_tensors)
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
            images = list(images)
        batch = list(images) if isinstance(images, list | tuple) else [images]
        if not batch:
            raise ValueError("No images were given.")
        pixels = [self._pixels(self.to_pil(image)) for image in batch]
        if len({array.shape for array in pixels}) > 1:
            raise ValueError(
                f"Images of a batch must have one size, got {sorted({array.shape[1:] for array in pixels})}; "
                "use resize_mode='crop' or pass them one by one."
            )
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)

    preprocess = __call__

    def to_pil(self, image) -> Image.Image:
        """An image of any kind as PIL image of mode L, LA, RGB or RGBA, by `num_channels`."""
        return read_image(image, CHANNELS[self.num_channels])

    def _pixels(self, image: Image.Image) -> np.ndarray:
        if self.resize_mode == "none":
            width, height = (side // self.size_divisor * self.size_divisor for side in image.size)
            if min(width, height) < 1:
                raise ValueError(
                    f"An image of {image.size[0]}×{image.size[1]} is smaller than {self.size_divisor} pixels; "
                    "use resize_mode='crop'."
                )
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        elif self.resize_mode == "crop":
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        else:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        array = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
        return np.moveaxis(array / 127.5 - 1.0, -1, 0)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """`(batch, channels, height, width)` in [-1, 1] (clamped) → PIL images."""
        arrays = ((pixel_values.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays.numpy()]


def as_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """One picture of images of equal size, in rows of `columns`, with white gaps."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for position, image in enumerate(images):
        left, top = position % columns * (width + gap) + gap, position // columns * (height + gap) + gap
        grid.paste(image.convert("RGB"), (left, top))
    return grid
