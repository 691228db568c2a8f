"""Seeded images of gradients, textures, shapes and letters: training data for image tokenizers without any file."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

GLYPHS = "ABCDEFGHKLMNPRSTUVXYZabdefghkmnpqrstuy0123456789&?#%"


def procedural_scene(seed: int, size: int = 64) -> Image.Image:
    """Draws one RGB image of `size` × `size` pixels: a gradient or texture, some shapes, perhaps text.

    Equal seeds draw equal pixels.
    """
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
