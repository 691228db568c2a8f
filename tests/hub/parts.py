"""What a tokenizer, an image processor or a processor makes of the same text and the same picture."""

import numpy as np
import torch
from PIL import Image

TEXT = "how many red circles are there ?"


def picture() -> Image.Image:
    """16 by 16 pixels, all different."""
    return Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))


def use_part(part) -> dict[str, torch.Tensor]:
    """Tensors by name."""
    name = type(part).__name__
    if "ImageProcessor" in name:
        made = part(picture(), return_tensors="pt")
    elif "Processor" not in name:
        made = part(TEXT, return_tensors="pt")
    elif "LFQ" in name:
        images = {} if part.base is None else {"images": [picture()]}
        marker = "<image> " if images else ""
        made = part(text=f"{marker}{TEXT} <lfq:3><lfq:17>", return_tensors="pt", **images)
    else:
        made = part(text=[f"<image> {TEXT}"], images=[picture()], return_tensors="pt")
    return {key: value for key, value in made.items() if torch.is_tensor(value)}
