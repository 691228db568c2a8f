"""Opens every image of the package: bitmap formats only, decoded, upright, the file named where it is broken."""

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

# Pillow decodes these itself. Without such a list it recognises PostScript by its first bytes, whatever the file's name,
# and starts Ghostscript on it.
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
# What decoders raise on broken files, beyond what they promise.
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
# A whole file has the end mark of its format within so many last bytes.
TAIL = 64


def open_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Opens an image file as it is (any mode), decoded and turned upright as its EXIF orientation says.

    Of an animation or a file of several pages the first is taken.

    Args:
        source: path or binary file object.

    Raises:
        ValueError: no such file, not of one of `FORMATS`, broken, or of more than twice `PIL.Image.MAX_IMAGE_PIXELS`
            pixels; the message names the file.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            return upright(image)
    except BROKEN as error:
        raise _unreadable(source, error) from error


def read_image(image, mode: str = "RGB") -> Image.Image:
    """A file (path or file object), PIL image, array or tensor as upright PIL image of 8 bits per channel.

    See `shared_image_pixels.to_mode` for what happens to 16 and 32 bits, floats, palettes and transparency.

    Args:
        mode: `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        TypeError: something that is not an image.
        ValueError: a file that cannot be read (named), or samples whose range is unclear.
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
    """`transformers.image_utils.load_image` with this opener: path, URL, data URI, base64, PIL image → image of `mode`.

    Args:
        timeout: seconds to wait for a URL.
        allow_urls: fetch `http://` and `https://` addresses, those of this machine and its network too.
        mode: `L`, `LA`, `RGB` or `RGBA`.

    Raises:
        TypeError: something that is not an image.
        ValueError: a URL where `allow_urls` is off, or what it or the file holds cannot be read.
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
    """Finds a broken image file without decoding it: by its header and its end, for PNG by its checksums.

    Only a file that fails this, or of a format without an end mark, is decoded to be sure.

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
    """The image turned as its EXIF orientation says; as it is where the orientation cannot be read."""
    try:
        turned = ImageOps.exif_transpose(image)
    except BROKEN:
        # The picture is whole; only the note on how it was held is not.
        turned = image.copy()
    turned.format = image.format  # tells `image_pixels` how older Pillow opened it
    return turned


def _loaded(image: Image.Image) -> Image.Image:
    """A PIL image that its caller opened, and that is perhaps not decoded yet."""
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
        except BROKEN:  # its pixels may still be whole, for example where only the end mark is missing
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
