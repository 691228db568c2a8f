"""Malformed images: files, and arrays and tensors that are no image."""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from faults_malformed_check import Case
from PIL import Image

from tokcom_hf.data.images import FolderImages, RandomCrops
from tokcom_hf.data.vqa import read_vqa_jsonl
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.shared_image_files import check_image, load_image

# Files that only decoding shows to be broken. The processor decodes them; `check_image` compares checksums, which are right.
DECODED = ("no_pixels.png", "too_few_pixels.png", "no_palette.png")
FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    """Bytes of an image file of this format; without an image, of noise."""
    if image is None:
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", more: bytes = b"") -> bytes:
    """Bytes of a PNG file with these header values and right checksums."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 100 MB."""
    content = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    return png(1, 1, data=b"\0\0\0\0", more=chunk)


def broken_files() -> dict[str, bytes]:
    """File name -> bytes that are no image, or no complete one."""
    whole = {name: encoded(name) for name in FORMATS}
    found = {f"cut_in_half.{name}": content[: len(content) // 2] for name, content in whole.items()}
    found |= {f"header_only.{name}": content[:12] for name, content in whole.items()}
    bitmap, jpeg = bytearray(whole["bmp"]), bytearray(whole["jpeg"])
    bitmap[18:26] = struct.pack("<ii", 2**30, 2**30)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65535, 65535)
    flipped = bytearray(whole["png"])
    flipped[60] ^= 0xFF
    return found | {
        "empty.png": b"",
        "one_byte.jpg": b"\xff",
        "zeros.png": bytes(1000),
        "text.png": b"This is no picture.\n" * 20,
        "noise.jpg": np.random.default_rng(1).bytes(5000),
        "page.png": b"<html><body>404 Not Found</body></html>",
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "drawing.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
        "document.png": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "archive.png": b"PK\x03\x04" + bytes(100),
        "pickle.png": b"\x80\x04\x95" + bytes(50),
        "flipped_byte.png": bytes(flipped),
        "no_width.png": png(0, 10),
        "negative_size.png": png(2**31 + 5, 2),
        "too_large.png": png(60_000, 60_000),
        "largest.png": png(2**31 - 1, 2**31 - 1),
        "no_pixels.png": png(10, 10),
        "too_few_pixels.png": png(100, 100, data=bytes(50)),
        "depth_17.png": png(10, 10, depth=17, data=bytes(400)),
        "colour_type_9.png": png(10, 10, colour=9, data=bytes(400)),
        "no_palette.png": png(2, 2, colour=3, data=bytes(6)),
        "text_bomb.png": text_bomb(),
        "too_large.bmp": bytes(bitmap),
        "too_large.jpg": bytes(jpeg),
        "too_large.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        "too_large.ppm": b"P6\n100000 100000\n255\n" + bytes(100),
        "long_number.ppm": b"P6\n" + b"9" * 5000 + b" 1\n255\n",
        "too_large.tiff": bytes(whole["tiff"][:4]) + struct.pack("<I", 2**31) + bytes(30),
    }


def good_files() -> dict[str, bytes]:
    """File name -> bytes of an unusual image, which must be accepted."""
    grey16 = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return {
        "one_pixel.png": encoded("png", Image.new("RGB", (1, 1))),
        "sixteen_bits.png": encoded("png", grey16),
        "palette.gif": encoded("gif", Image.new("P", (9, 9))),
        "animated.gif": encoded("gif", frames[0], save_all=True, append_images=frames[1:]),
        "grey_alpha.png": encoded("png", Image.new("LA", (9, 9))),
        "one_bit.png": encoded("png", Image.new("1", (9, 9))),
        "cmyk.jpg": encoded("jpeg", Image.new("CMYK", (9, 9))),
        "thin.png": encoded("png", Image.new("RGB", (2000, 1))),
    }


def samples() -> dict[str, object]:
    """Values to pass instead of an image, by description."""
    floats = np.full((8, 8, 3), 0.5, dtype=np.float32)
    return {
        "None": None,
        "a number": 3,
        "a dictionary": {"image": 1},
        "bytes": b"\x89PNG",
        "an empty list": [],
        "a list of None": [None],
        "five channels": np.zeros((8, 8, 5), dtype=np.uint8),
        "no pixels": np.zeros((0, 0, 3), dtype=np.uint8),
        "no height": np.zeros((0, 8, 3), dtype=np.uint8),
        "one dimension": np.zeros(8, dtype=np.uint8),
        "five dimensions": np.zeros((1, 1, 8, 8, 3), dtype=np.uint8),
        "objects": np.array([[object()]]),
        "strings": np.array([["a", "b"], ["c", "d"]]),
        "complex numbers": np.zeros((8, 8, 3), dtype=np.complex64),
        "NaN": floats * np.nan,
        "infinity": floats * np.inf,
        "floats beyond 255": floats * 10_000,
        "negative floats": floats - 5,
        "a tensor of NaN": torch.full((3, 8, 8), float("nan")),
        "a tensor of seven channels": torch.zeros(7, 8, 8),
        "a tensor without dimensions": torch.tensor(1.0),
        "a tensor without pixels": torch.zeros(3, 0, 8),
        "a sparse tensor": torch.zeros(3, 8, 8).to_sparse(),
        "a complex tensor": torch.zeros(3, 8, 8, dtype=torch.complex64),
        "a meta tensor": torch.zeros(3, 8, 8, device="meta"),
    }


def cases(folder: Path) -> Iterator[Case]:
    """Writes the files into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = VQGANImageProcessor(16, size_divisor=8)
    for name, content in broken_files().items():
        path = folder / name
        path.write_bytes(content)
        yield Case("images", f"processor: {name}", partial(processor, str(path)), (name,))
        if name not in DECODED:
            yield Case("images", f"check: {name}", partial(check_image, str(path)), (name,))
    for name in ("cut_in_half.png", "empty.png", "too_large.png", "text.png", "noise.jpg"):
        rows = folder / f"{name}.jsonl"
        row = {"image": name, "question": "colour ?", "answer": "red"}
        rows.write_text(json.dumps(row), encoding="utf-8")
        yield Case("images", f"rows: {name}", partial(read_vqa_jsonl, rows), (name,))
    for name, content in good_files().items():
        path = folder / "good" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        yield Case("images", f"processor: {name}", partial(processor, str(path)), fine=True)
        yield Case("images", f"check: {name}", partial(check_image, str(path)), fine=True)
    for name, value in samples().items():
        yield Case("images", f"processor: {name}", partial(processor, value), fine=False)
    yield from sources(folder, processor)


def sources(folder: Path, processor: VQGANImageProcessor) -> Iterator[Case]:
    """Folders, paths and addresses without a readable image."""
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "only_broken").mkdir(exist_ok=True)
    (folder / "only_broken" / "empty.png").write_bytes(b"")
    for name, words in {"missing": ("missing",), "nothing": ("nothing",), "only_broken": ("only_broken",)}.items():
        yield Case("images", f"folder: {name}", partial(FolderImages, folder / name, processor), words)
    yield Case("images", "folder: a file", partial(FolderImages, folder / "text.png", processor), ("text.png",))
    yield Case("images", "crops: nothing", partial(RandomCrops, folder / "nothing", processor, 2), ("nothing",))
    for name, source in {
        "a missing path": "./missing.png",
        "no base64": "not base64 at all!",
        "a data URI of text": "data:image/png;base64,aGVsbG8=",
        "a data URI without data": "data:image/png;base64,",
        "an empty string": "",
        "a zero byte": "a\0b.png",
        "a folder": str(folder),
        "a very long string": "A" * 200_000,
        "an FTP address": "ftp://127.0.0.1/a.png",
    }.items():
        yield Case("images", f"load_image: {name}", partial(load_image, source), (source[:20], "image"))
    address = "http://127.0.0.1:9/a.png"
    yield Case(
        "images", "load_image: a URL that is not allowed", partial(load_image, address, None, False), (address,)
    )
