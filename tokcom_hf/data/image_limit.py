"""Limits the pixels and vision tokens of an image before a vision-language model's processor receives it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass
class ImageLimit:
    """Shrinks images to the given limits, keeping the aspect ratio; images within the limits stay unchanged.

    Args:
        processor: the VLM's processor; with `max_vision_tokens` it is called to count the tokens of an image size.
        image_max_size: maximum length of an image's longest side, in pixels.
        max_vision_tokens: maximum number of vision tokens per image.
        kept: function from the number of vision tokens to the number left by the merger or strategy before the language
            model, or None. Where even the smallest image has too many vision tokens, the limit applies to this number.

    Raises:
        ValueError: a limit is below 1, or (when called) an image cannot be brought within `max_vision_tokens`.
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
        # The smallest size tried has a short side of one pixel, so that rounding does not distort the aspect ratio.
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
        """Number of vision tokens that the processor makes from an image of `size` (width, height) in pixels."""
        text = getattr(self.processor, "image_token", "<image>")
        placeholder = getattr(self.processor, "image_token_id", None)
        if placeholder is None:
            placeholder = self.processor.tokenizer.convert_tokens_to_ids(text)
        ids = self.processor(text=[text], images=[Image.new("RGB", size)])["input_ids"][0]
        return list(ids).count(placeholder)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Scales `size` down to a longest side of `longest` pixels; a smaller size is returned as it is."""
    width, height = size
    if longest >= max(size):
        return size
    scale = longest / max(size)
    return max(1, round(width * scale)), max(1, round(height * scale))
