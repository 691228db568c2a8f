"""Opens image files for the whole package: bitmap formats only, decoded, turned upright; errors name the file."""

import base64
import binascii
import io
import os
import struct
import zlib
from contextlib import nullcontext
from typing import BinaryIO

from huggingface_hub.utils import httpx
from PIL import Image, ImageOps

from .shared_image_pixels import to_mode

# Formats that Pillow decodes itself. Without such a list it recognises PostScript by its first bytes, whatever the file's
# name, and runs Ghostscript on it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# Errors that Pillow's decoders raise on broken files; not all of them are documented.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# Number of last bytes among which a complete file has the end mark of its format.
TAIL = 64


def open_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Opens an image file in its own mode, decoded and turned upright by its EXIF orientation; the first page of several.

    Args:
        source: path or binary file object.

    Raises:
        ValueError: the file is missing, broken, of none of `FORMATS`, or of more than twice `PIL.Image.MAX_IMAGE_PIXELS`
            pixels; the message names it.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            if image.mode == "P" and not (image.palette and image.palette.palette):
                raise ValueError("its pixels are indices into a palette, which the file lacks")
            return upright(image)
    except BROKEN as error:
        raise _unreadable(source, error) from error


def read_image(image, mode: str = "RGB") -> Image.Image:
    """A file (path or file object), PIL image, array or tensor → upright PIL image of 8 bits per channel.

    `shared_image_pixels.to_mode` describes the conversion of 16 and 32 bits, floats, palettes and transparency.

    Args:
        mode: `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        TypeError: `image` is no image.
        ValueError: the file cannot be read, or the range of the samples is unclear.
    """
    source = image
    if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        image = open_image(image)
    elif isinstance(image, Image.Image):
        image = _loaded(image)
    try:
        return to_mode(image, mode)
    except ValueError as error:
        if image is source:
            raise
        raise _unreadable(source, error) from error


def load_image(source, timeout: float | None = None, allow_urls: bool = True, mode: str = "RGB") -> Image.Image:
    """Path, URL, data URI, base64 or PIL image → image of `mode`; `transformers.image_utils.load_image` with `read_image`.

    Args:
        timeout: seconds to wait for a URL.
        allow_urls: fetch `http://` and `https://` addresses, those of this machine and its network, too.
        mode: `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        TypeError: `source` is no image.
        ValueError: `allow_urls` is off and `source` a URL, or the image cannot be read.
    """
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            if not allow_urls:
                raise ValueError(f"{source!r} is a URL, and allow_urls is off: pass a path or a PIL image.")
            try:
                content = httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status().content
            except httpx.HTTPError as error:
                raise _unreadable(source, error) from error
            source = io.BytesIO(content)
        elif source.startswith("data:"):
            source = io.BytesIO(_base64(source.partition(",")[2], source))
        elif not os.path.isfile(source) and os.path.splitext(source)[1].lower() not in SUFFIXES:
            source = io.BytesIO(_base64(source, source))
    return read_image(source, mode)


def check_image(source: str | os.PathLike | BinaryIO) -> None:
    """Refuses a broken image file by its header and its end mark, or its checksums (PNG), mostly without decoding it.

    A file that fails this check, or whose format has no end mark, is decoded to be sure.

    Raises:
        ValueError: as `open_image`.
    """
    try:
        with open(source, "rb") if isinstance(source, str | os.PathLike) else nullcontext(source) as file:
            whole = _is_whole(file, Image.open(file, formats=FORMATS))
            file.seek(0)
    except BROKEN as error:
        raise _unreadable(source, error) from error
    if not whole:
        open_image(source)


def upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation, or a copy if the orientation cannot be read."""
    try:
        turned = ImageOps.exif_transpose(image)
    except BROKEN:
        # The EXIF data are broken, not the pixels.
        turned = image.copy()
    turned.format = image.format  # for `shared_image_pixels`, because older Pillow opens some formats in another mode
    return turned


def _loaded(image: Image.Image) -> Image.Image:
    """A PIL image from a caller, decoded and upright."""
    name = getattr(image, "filename", "") or f"PIL image of format {image.format}"
    if image.format == "EPS":
        raise ValueError(f"Cannot read image {name!r}: decoding PostScript starts Ghostscript; pass a bitmap of it.")
    try:
        image.load()
    except BROKEN as error:
        raise _unreadable(name, error) from error
    return upright(image)


def _is_whole(file: BinaryIO, image: Image.Image) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read()
    if image.format == "PNG":
        try:
            image.verify()
        except BROKEN:  # the pixels may be whole, for example where only the end mark is missing
            return False
        return True
    if image.format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if image.format == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    if image.format == "WEBP":
        file.seek(4)
        return struct.unpack("<I", file.read(4))[0] + 8 <= size
    return False


def _base64(text: str, source: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"{source[:80]!r} is no image: neither an existing file, a URL beginning with http:// or https://, nor base64."
        ) from None


def _unreadable(source, error: BaseException) -> ValueError:
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", type(source).__name__)
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"not an image of the formats {', '.join(FORMATS)}, or with samples that Pillow cannot decode"
    elif isinstance(error, FileNotFoundError):
        reason = "no such file"
    elif isinstance(error, IsADirectoryError):
        reason = "it is a folder"
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        reason += " Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
    return ValueError(f"Cannot read image {str(name)!r}: {reason}")
