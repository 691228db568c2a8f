"""What tokenizers, processors and pipelines make of the same text and the same picture."""

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


def use_pipeline(task: str, pipe) -> list:
    """Its result, as plain values."""
    if task == "tokcom-generation":
        made = pipe(["how many circles", "red"], num_generate_chunks=2, num_steps=2, seed=0)
    elif task.startswith("vq-"):
        made = pipe([picture(), picture().rotate(90)])
    elif task == "lfq-image-text":
        made = pipe("a red circle", num_image_tokens=4, seed=0)
    else:
        made = pipe({"images": [picture()], "text": f"<image> {TEXT}"})
    return plain(made)


def plain(value):
    """Pictures, arrays and tensors as lists; what is not a value but an object by its type."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
