"""Tab "Drawing": pictures from a caption, token by token, with an `LFQExpandedModel`."""

import time
from typing import Any

from PIL import Image

from tokcom_hf.data.caption_images import caption_of, draw_scenes


def example_caption(seed: int) -> str:
    """A caption of the kind that recipes/image_tokens.py trains on by default."""
    return caption_of(draw_scenes(1, seed, dots=False, min_objects=1, max_objects=2, grid=2)[0])


def draw(
    pipe: Any, caption: str, pictures: int, guidance_scale: float, temperature: float, seed: int
) -> tuple[list[Image.Image], str]:
    """Pictures of a caption.

    Args:
        pipe: `lfq-image-text` pipeline.
        guidance_scale: strength of classifier-free guidance; above 1 the caption has more influence.

    Returns:
        The pictures, and a sentence about tokens and seconds.

    Raises:
        ValueError: the caption is empty, or the folder has no image decoder.
    """
    if not caption.strip():
        raise ValueError("There is no caption; write one, for example 'a large red ring at the top left'.")
    if pipe.image_decoder is None:
        raise ValueError(
            "This folder has no image_decoder/, so its tokens cannot be drawn; run recipes/image_tokens.py."
        )
    started = time.perf_counter()
    results = pipe(
        caption,
        num_return_sequences=pictures,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=0,
        seed=seed,
    )
    seconds = time.perf_counter() - started
    tokens = sum(len(result["token_ids"]) for result in results)
    drawn = [image for result in results for image in result["images"]]
    size = 2**pipe.model.config.output_dim
    return drawn, f"{tokens} tokens in {seconds:.1f} s; the vocabulary has {size:,} image tokens."
