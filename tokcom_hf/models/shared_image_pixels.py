"""Pixels of any depth, layout and transparency to 8-bit PIL images."""

import numpy as np
import torch
from PIL import Image

CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Floats may exceed their range by a rounding error of half an 8-bit level.
ROUNDING = 0.5 / 255


def to_mode(image, mode: str) -> Image.Image:
    """PIL image, array or tensor → PIL image of `mode`.

    - `to_uint8` scales the samples.
    - Transparency (alpha, a transparent colour, a palette with alpha) is kept in `LA` and `RGBA`, and laid on white for
      `L` and `RGB`.
    - CMYK, palette, grey and black-and-white images are converted.

    Args:
        image: a PIL image of any mode, a NumPy array `(height, width[, channels])`, or a tensor
            `(channels, height, width)` or `(height, width)`; arrays with channels first and tensors with channels last
            are accepted where the shape leaves no doubt.
        mode: `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        TypeError: `image` is no image.
        ValueError: the image is empty, its shape is none of these, or `to_uint8` refuses its samples.
    """
    if isinstance(image, torch.Tensor):
        if image.is_meta:
            raise ValueError("The image is a tensor on the device meta, which holds no values.")
        tensor = image.detach().cpu()
        # NumPy has no bfloat16.
        image = from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)
    elif isinstance(image, np.ndarray):
        image = from_array(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected a PIL image, a path, an array or a tensor, got {type(image).__name__}.")
    if min(image.size) < 1:
        raise ValueError(f"The image has no pixels: its size is {image.size[0]}×{image.size[1]}.")
    if image.mode.startswith(("I", "F")):
        image = _deep(image)
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and mode in ("L", "RGB"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if mode == "LA" and image.mode not in ("L", "LA"):
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def from_array(array: np.ndarray, channels_first: bool = False) -> Image.Image:
    """Array `(height, width[, channels])`, or `(channels, height, width)`, → PIL image of mode L, LA, RGB or RGBA.

    Args:
        channels_first: whether channels come first if the shape alone does not tell.

    Raises:
        ValueError: the shape is none of these, or `to_uint8` refuses the samples.
    """
    if array.ndim == 3:
        front, back = array.shape[0], array.shape[2]
        if front in CHANNELS if channels_first else front in (1, 3) and back not in CHANNELS:
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise ValueError(
            "An image must have shape (height, width), (height, width, 1 to 4 channels) or (1 to 4 channels, height, "
            f"width) and no empty side, got {array.shape}."
        )
    array = to_uint8(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Samples of any type → uint8 from 0 (black) to 255 (white).

    | type | values | white |
    |---|---|---|
    | bool | | True |
    | uint8 | 0 to 255 | 255 |
    | uint16 | 0 to 65535 | 65535 |
    | other integers | 0 to 255 | 255 |
    | | up to 65535 | 65535 |
    | | beyond, or negative | their largest value (black is 0, or their smallest if negative) |
    | floats | 0 to 1 | 1 |
    | | 0 to 255, some of them 2 or more | 255 |

    Floats are never divided by their own largest value, so that an underexposed photo stays dark.

    Raises:
        ValueError: samples are NaN, infinite or of another type; floats are negative, above 255, or have a largest value
            between 1 and 2: they may be levels up to 255 of a nearly black image, or unclipped values from 0 to 1.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise ValueError(f"Image samples must be booleans, integers or floats, got {array.dtype}.")
    black, white = 0.0, 65535.0
    if array.dtype.kind == "f":
        white = _float_white(array)
    elif array.dtype.newbyteorder("=") != np.uint16:
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high <= 255:
            white = 255.0
        elif low < 0 or high > 65535:
            black, white = min(low, 0), max(high, 0)
    shares = (array.astype(np.float64) - black) / (white - black)
    return np.clip(np.rint(shares * 255), 0, 255).astype(np.uint8)


def _float_white(array: np.ndarray) -> float:
    if not np.isfinite(array).all():
        raise ValueError("The image holds NaN or infinite values.")
    low, high = float(array.min()), float(array.max())
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return 1.0
    if low >= -0.5 and 2 <= high < 255.5:
        return 255.0
    raise ValueError(
        f"Float images must hold values from 0 to 1, or levels from 0 to 255, got {low:g} to {high:g}; scale or clip them, "
        "or convert them to uint8."
    )


def _deep(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits per sample → 8 bits, with alpha where a grey value is transparent."""
    samples, clear = np.asarray(image), image.info.get("transparency")
    # Older Pillow opens grey files of 16 bits with 32-bit samples.
    if image.mode == "I" and image.format in ("PNG", "PPM") and samples.min() >= 0 and samples.max() <= 65535:
        samples = samples.astype(np.uint16)
    grey = from_array(samples)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return grey
