"""Fewer pixels and fewer vision tokens per image, before the processor of a vision-language model sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass
class ImageLimit:
    """Makes images smaller, aspect ratio kept, until they are within the limits; images within them stay as they are.

    Args:
        processor: of the VLM; where `max_vision_tokens` is set it tells how many tokens an image of some size becomes.
        image_max_size: pixels of an image's longest side, at most.
        max_vision_tokens: vision tokens of an image, at most.
        kept: tokens that stay of so many before the language model (a merger's or a strategy's number), or None. Where
            the processor makes too many tokens of any image, however small, the limit holds for these.

    Raises:
        ValueError: a limit below 1; when called, an image that cannot be brought within `max_vision_tokens`.
    """

    processor: Any
    image_max_size: int | None = None
    max_vision_tokens: int | None = None
    kept: Callable[[int], int] | None = None
    _sizes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name in ("image_max_size", "max_vision_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size not in self._sizes:
            self._sizes[image.size] = self._limited(image.size)
        size = self._sizes[image.size]
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)

    def _limited(self, size: tuple[int, int]) -> tuple[int, int]:
        longest = max(size)
        if self.image_max_size is not None and longest > self.image_max_size:
            longest = self.image_max_size
        limited = _scaled(size, longest)
        most = self.max_vision_tokens
        if most is None or (tokens := self.vision_tokens(limited)) <= most:
            return limited
        # No side below one pixel, and no aspect ratio beyond what it was.
        fits, too_long = max(1, -(-max(size) // min(size))), longest
        fewest = self.vision_tokens(_scaled(size, fits))
        if fewest > most:
            if self.kept is not None and self.kept(tokens) <= most:
                return limited
            raise ValueError(
                f"max_vision_tokens={most} cannot be reached by a smaller image: this processor makes at least {fewest} "
                f"vision tokens of an image of {size[0]} × {size[1]} pixels. Merge them before the language model: set "
                f"--target_merge_tokens (or --strategy and --keep) to {most} or less, or raise max_vision_tokens."
            )
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.vision_tokens(_scaled(size, middle)) <= most:
                fits = middle
            else:
                too_long = middle
        return _scaled(size, fits)

    def vision_tokens(self, size: tuple[int, int]) -> int:
        """Vision tokens that the processor makes of an image of (width, height) pixels."""
        text = getattr(self.processor, "image_token", "<image>")
        placeholder = getattr(self.processor, "image_token_id", None)
        if placeholder is None:
            placeholder = self.processor.tokenizer.convert_tokens_to_ids(text)
        ids = self.processor(text=[text], images=[Image.new("RGB", size)])["input_ids"][0]
        return list(ids).count(placeholder)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` with a longest side of `longest` pixels."""
    width, height = size
    if longest >= max(size):
        return size
    scale = longest / max(size)
    return max(1, round(width * scale)), max(1, round(height * scale))
