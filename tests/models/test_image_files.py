"""The one opener: which files it opens, how pixels of any kind are read, and what it says about broken ones."""

import base64
import io
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokcom_hf
from tokcom_hf import VQGAN, VQGANConfig, VQGANImageProcessor
from tokcom_hf.models.pipeline_vqgan import VQTokenizePipeline
from tokcom_hf.models.shared_image_files import check_image, load_image, open_image, read_image
from tokcom_hf.models.shared_image_pixels import to_mode, to_uint8

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def encoded(image, kind, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def noise(size=(64, 64), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def grey(image) -> int:
    """The level of an even grey image."""
    low, high = read_image(image, "L").getextrema()
    assert low == high
    return low


# ---------------------------------------------------------------------------------------------------------------- trust
@pytest.mark.parametrize("name", ["photo.png", "photo.JPG", "photo.eps", "photo"])
def test_postscript_of_any_name_starts_no_program(tmp_path, monkeypatch, name):
    """A program called `gs` stands first in PATH; Pillow would start it."""
    started, script = tmp_path / "started", tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nopen({str(started)!r}, 'w')\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for source in (tmp_path / name, io.BytesIO(POSTSCRIPT)):
        for read in (open_image, read_image, check_image):
            with pytest.raises(ValueError, match="not an image of the formats PNG, JPEG"):
                read(source)
    with Image.open(io.BytesIO(POSTSCRIPT)) as opened, pytest.raises(ValueError, match="starts Ghostscript"):
        read_image(opened)
    assert not started.exists()


def test_no_other_module_opens_images():
    package = Path(tokcom_hf.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "recipes").rglob("*.py")]
    openers = {path.name for path in sources if "Image.open(" in path.read_text(encoding="utf-8")}
    assert openers == {"shared_image_files.py"}


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise((30, 30)).save(tmp_path / "bomb.png")
    for read in (open_image, check_image):
        with pytest.raises(ValueError, match=r"bomb.png': .*900 pixels.* raise PIL.Image.MAX_IMAGE_PIXELS"):
            read(tmp_path / "bomb.png")


# ------------------------------------------------------------------------------------------------------------ 16, 32 bits
@pytest.mark.parametrize(
    ("samples", "kind", "level"),
    [
        (np.full((4, 4), 32768, np.uint16), "TIFF", 128),
        (np.full((4, 4), 32768, ">u2"), "TIFF", 128),
        (np.full((4, 4), 32768, np.uint16), "PNG", 128),
        (np.full((4, 4), 200, np.uint16), "PNG", 1),
        (np.full((4, 4), 200, np.int32), "TIFF", 200),
        (np.full((4, 4), 25700, np.int32), "TIFF", 100),
        (np.full((4, 4), 0.25, np.float32), "TIFF", 64),
        (np.full((4, 4), 25.0, np.float32), "TIFF", 25),
    ],
)
def test_deep_files_keep_their_brightness(samples, kind, level):
    image = Image.fromarray(samples.astype(samples.dtype))
    assert grey(encoded(image, kind)) == level
    assert grey(image) == level


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i4"])
@pytest.mark.parametrize(("low", "high"), [(0, 2_000_000), (0, 70_000), (-1000, 1000)])
def test_integers_beyond_16_bits_become_an_even_ramp(dtype, low, high):
    if low < 0 and np.dtype(dtype).kind == "u":
        low = 0
        high = 200_000
    ramp = to_uint8(np.linspace(low, high, 1024).reshape(32, 32).astype(dtype))
    assert ramp[0, 0] == 0 and ramp[-1, -1] == 255 and abs(ramp.mean() - 127.5) < 1
    assert (np.diff(ramp.ravel().astype(int)) >= 0).all()


# ----------------------------------------------------------------------------------------------------------------- floats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_shares_of_white_or_levels_and_never_stretched(dtype):
    for level in (0.0, 0.25, 0.5, 1.0):
        assert abs(grey(torch.full((3, 8, 8), level, dtype=dtype)) - level * 255) <= 0.5
    for level in (2.0, 64.0, 128.0, 200.0, 255.0):
        image = torch.full((3, 8, 8), level, dtype=dtype)
        assert grey(image) == level
        assert grey(image[0].float().numpy()) == level
        assert grey(Image.fromarray(image[0].float().numpy())) == level


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 1), (0, 1.5), (0, 256), (-20, 255), (0, 65535), (0, np.inf), (np.nan, 1)]
)
def test_floats_of_unclear_range_are_refused(tmp_path, low, high):
    image = np.full((8, 8), 0.5, np.float32)
    image[0, 0], image[-1, -1] = low, high
    with pytest.raises(ValueError, match=r"NaN or infinite|from 0 to 1, or levels from 0 to 255"):
        read_image(image)
    Image.fromarray(image).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif': "):
        read_image(tmp_path / "a.tif")


def test_rounding_errors_of_floats_are_clipped():
    image = np.linspace(-1e-4, 1 + 1e-4, 64, dtype=np.float32).reshape(8, 8)
    assert read_image(image, "L").getextrema() == (0, 255)


# ---------------------------------------------------------------------------------------------------------------- layouts
def test_layouts_that_leave_no_doubt_are_understood():
    picture = np.asarray(noise((8, 6)))
    for image in (picture, picture.transpose(2, 0, 1), torch.from_numpy(picture.copy()).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(read_image(image)), picture)
    assert np.array_equal(np.asarray(read_image(torch.from_numpy(picture.copy()))), picture)
    # Both ends could be channels: arrays have them last, tensors first.
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert read_image(small).size == (5, 4) and read_image(torch.from_numpy(small), "RGBA").size == (3, 5)
    for shape in ((8, 8, 5), (4, 4, 5), (2, 3, 8, 8), (8,), (0, 8, 3)):
        with pytest.raises(ValueError, match="must have shape"):
            read_image(np.zeros(shape, np.uint8))
    for wrong in (np.zeros((8, 8), complex), np.zeros((8, 8), "U1")):
        with pytest.raises(ValueError, match="booleans, integers or floats"):
            read_image(wrong)
    with pytest.raises(TypeError, match="got NoneType"):
        read_image(None)
    with pytest.raises(TypeError, match="got bytes"):
        read_image(b"a.png")


# ------------------------------------------------------------------------------------------------------------ transparency
def transparent_images():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    yield "RGBA", encoded(clear, "PNG")
    yield "LA", encoded(Image.new("LA", (8, 8), (0, 0)), "PNG")
    yield "palette", encoded(clear.quantize(), "PNG")
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    yield "palette with a transparent entry", encoded(palette, "PNG", transparency=3)
    yield "GIF", encoded(palette, "GIF", transparency=3)
    yield "transparent grey", encoded(Image.new("L", (8, 8), 5), "PNG", transparency=5)
    yield "transparent colour", encoded(Image.new("RGB", (8, 8), (5, 6, 7)), "PNG", transparency=(5, 6, 7))
    yield "premultiplied", Image.new("RGBa", (8, 8), 0)
    yield "premultiplied grey", Image.new("La", (8, 8), 0)
    deep = Image.fromarray(np.full((8, 8), 300, np.uint16))
    deep.info["transparency"] = 300
    yield "transparent 16-bit grey", deep


@pytest.mark.parametrize(("name", "image"), transparent_images())
def test_transparency_shows_white(name, image):
    assert read_image(image).getcolors() == [(64, (255, 255, 255))]
    assert read_image(image, "L").getcolors() == [(64, 255)]
    assert read_image(image, "RGBA").getextrema()[3] == (0, 0)
    assert read_image(image, "LA").getextrema()[1] == (0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "red"),
    [("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("1", 1, (255, 255, 255)), ("HSV", (0, 255, 255), (255, 0, 0)),
     ("YCbCr", (128, 128, 128), (128, 128, 128)), ("L", 9, (9, 9, 9))],
)  # fmt: skip
def test_modes_are_converted(mode, colour, red):
    assert to_mode(Image.new(mode, (8, 8), colour), "RGB").getcolors() == [(64, red)]


# ------------------------------------------------------------------------------------------------------- orientation, pages
def test_first_page_upright():
    orientation = Image.Exif()
    orientation[0x112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert read_image(encoded(noise((20, 10)), kind, exif=orientation)).size == (10, 20)
    pages = [Image.new("RGB", (8, 8), name) for name in ("red", "lime")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)
        assert read_image(data).getpixel((0, 0)) == (255, 0, 0)


# ----------------------------------------------------------------------------------------------------------------- broken
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_broken_files_are_found_without_decoding_whole_ones(tmp_path, monkeypatch, kind):
    path, whole = tmp_path / "photo.img", encoded(noise(), kind).getvalue()
    path.write_bytes(whole)
    if kind in ("PNG", "JPEG", "GIF", "WEBP"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", None)
            check_image(path)
    check_image(path)
    check_image(io.BytesIO(whole))
    for broken in (whole[: len(whole) // 2], whole[:40], b"not an image", b""):
        path.write_bytes(broken)
        for read in (open_image, check_image):
            with pytest.raises(ValueError, match=r"Cannot read image '.*photo\.img'"):
                read(path)


def test_a_broken_file_that_the_caller_opened_is_named(tmp_path):
    data = encoded(noise(), "PNG").getvalue()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(ValueError, match=r"cut\.png': .*truncated"):
        read_image(opened)


def test_files_with_something_behind_their_end_are_whole(tmp_path):
    path = tmp_path / "motion.jpg"
    path.write_bytes(encoded(noise(), "JPEG").getvalue() + b"\0" * 5000)
    check_image(path)
    path.write_bytes(encoded(noise(), "PNG").getvalue()[:-12])  # Pillow reads a PNG without its end mark
    check_image(path)


def test_missing_files_and_folders_are_named(tmp_path):
    for read in (open_image, read_image, check_image):
        with pytest.raises(ValueError, match=r"none\.png': no such file"):
            read(tmp_path / "none.png")
        with pytest.raises(ValueError, match="it is a folder"):
            read(tmp_path)


# ---------------------------------------------------------------------------------------------- what transformers takes
def test_load_image_takes_what_transformers_takes(tmp_path, monkeypatch):
    data = encoded(noise(), "PNG").getvalue()
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    expected = np.asarray(noise())
    for source in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        text,
        f"data:image/png;base64,{text}",
        noise(),
        io.BytesIO(data),
    ):
        assert np.array_equal(np.asarray(load_image(source)), expected)
    clear = base64.b64encode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG").getvalue()).decode()
    assert load_image(clear).getpixel((0, 0)) == (255,) * 3 and load_image(clear, mode="LA").getpixel((0, 0))[1] == 0
    with pytest.raises(ValueError, match="neither an existing file, a URL"):
        load_image("no such thing")
    with pytest.raises(ValueError, match=r"none\.png': no such file"):
        load_image("none.png")
    with pytest.raises(ValueError, match="not an image of the formats"):
        load_image(f"data:image/png;base64,{base64.b64encode(POSTSCRIPT).decode()}")
    with pytest.raises(ValueError, match="is a URL, and allow_urls is off"):
        load_image("http://127.0.0.1:9/a.png", allow_urls=False)
    with pytest.raises(ValueError, match=r"Cannot read image 'http://127\.0\.0\.1:9/a\.png'"):
        load_image("http://127.0.0.1:9/a.png", timeout=5)


def test_the_pipeline_keeps_transparency_for_models_that_have_it():
    config = VQGANConfig(
        image_size=16, in_channels=4, out_channels=4, codebook_size=8, codebook_dim=4, base_channels=8, mid_attention=False,
        channel_multipliers=[1, 2], downsample_factor=4, patch_size=2, num_res_blocks=1, latent_channels=8,
    )  # fmt: skip
    pipe = VQTokenizePipeline(VQGAN(config), image_processor=VQGANImageProcessor(16, 4, size_divisor=4))
    file = encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert pipe.preprocess([uri])["pixel_values"].unique().tolist() == [-1.0]
