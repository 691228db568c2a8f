"""Tab "Image codes": what a VQGAN keeps of a picture."""

import colorsys
from typing import Any

import torch
from PIL import Image

from tokcom_hf.data.images import FIRST_HELD_OUT, procedural_scene
from tokcom_hf.metrics.codebook import codebook_usage, utilization_ceiling
from tokcom_hf.metrics.image import psnr

# Hue step from code to code, as a share of the colour circle: close codes get clearly different hues.
GOLDEN_RATIO = 0.618034


def example_image(seed: int) -> Image.Image:
    """A procedural picture of 256 × 256 pixels that no recipe trains on."""
    return procedural_scene(FIRST_HELD_OUT + seed, 256)


def code_map(codes: torch.Tensor) -> Image.Image:
    """Codes (h, w) as a picture of h × w pixels, every code in a colour of its own."""
    colours = {
        code: tuple(
            round(255 * part)
            for part in colorsys.hsv_to_rgb(code * GOLDEN_RATIO % 1, 0.45 + code % 3 * 0.2, 0.95 - code // 3 % 3 * 0.2)
        )
        for code in codes.unique().tolist()
    }
    image = Image.new("RGB", (codes.shape[1], codes.shape[0]))
    image.putdata([colours[code] for code in codes.flatten().tolist()])
    return image


@torch.no_grad()
def reconstruct(pipe: Any, image: Image.Image | None) -> tuple[Image.Image, Image.Image, Image.Image, str]:
    """A picture through the codes and back.

    Args:
        pipe: `vq-reconstruction` pipeline.

    Returns:
        The picture as the model sees it, its reconstruction, the map of its codes, and a Markdown table of their use.

    Raises:
        ValueError: no picture.
    """
    if image is None:
        raise ValueError("There is no image; upload one or draw an example.")
    result = pipe(image, allow_urls=False)
    processor, codes = pipe.image_processor, torch.tensor(result["codes"])
    pixels = processor(image)["pixel_values"]
    size = pipe.model.config.codebook_size
    usage = codebook_usage(codes, size)
    fidelity = psnr(processor(result["image"])["pixel_values"], pixels).item()
    ceiling = utilization_ceiling(codes.numel(), size)
    table = (
        "| codes of this picture | |\n|---|---:|\n"
        f"| grid | {codes.shape[0]} × {codes.shape[1]} = {codes.numel()} |\n"
        f"| codebook | {size} codes |\n"
        f"| distinct codes | {usage['active']} ({usage['utilization']:.1%} of the codebook; "
        f"{ceiling:.1%} if drawn uniformly) |\n"
        f"| normalised entropy | {usage['normalized_entropy']:.3f} |\n"
        f"| PSNR | {fidelity:.1f} dB |"
    )
    return processor.postprocess(pixels)[0], result["image"], code_map(codes), table
