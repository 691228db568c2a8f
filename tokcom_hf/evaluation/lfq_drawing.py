"""Text-to-image generation with LFQ tokens: encodes images as codes, draws captions, and evaluates the drawn images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..data.caption_images import CaptionImages
from .scene_reader import SceneReader, score_scene


@torch.no_grad()
def tokenize_images(decoder, image_processor, rows, batch_size: int = 128) -> torch.Tensor:
    """Encodes the images of caption rows as codes `(rows, h, w)`."""
    codes = []
    for start in tqdm(range(0, len(rows), batch_size), desc="images to tokens", leave=False):
        images = [rows[index]["image"] for index in range(start, min(start + batch_size, len(rows)))]
        pixels = image_processor(images, return_tensors="pt")["pixel_values"].to(decoder.device)
        codes.append(decoder.encode(pixels).cpu())
    return torch.cat(codes)


@torch.no_grad()
def decode_images(decoder, image_processor, codes: torch.Tensor, batch_size: int = 128) -> list[Image.Image]:
    """Decodes codes `(rows, h, w)` to images."""
    images: list[Image.Image] = []
    for part in codes.split(batch_size):
        images += image_processor.postprocess(decoder.decode_codes(part.to(decoder.device)).cpu())
    return images


@torch.no_grad()
def draw(
    model,
    processor,
    prompts: Sequence[str],
    starts: torch.LongTensor | None,
    count: int,
    *,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    **options: Any,
) -> torch.Tensor:
    """Generates images for captions; returns their codes `(prompts, count)`.

    Args:
        model: an `LFQExpandedModel`.
        processor: the model's `LFQProcessor`.
        prompts: captions.
        starts: given first codes `(prompts, n)` of each image, or None.
        count: number of tokens of an image.
        guidance_scale: classifier-free guidance against an empty caption; 1 turns it off.
        batch_size: captions per batch.
        options: further arguments of `generate`, for example `temperature`.
    """
    tokenizer, first = processor.tokenizer, processor.lfq_start_token_id
    tokenizer.padding_side = "left"
    given = 0 if starts is None else starts.shape[1]
    codes = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing", leave=False):
        texts = [
            processor.image_prompt.replace("{caption}", caption) for caption in prompts[start : start + batch_size]
        ]
        markers = (
            [""] * len(texts) if starts is None else [processor.render(s) for s in starts[start : start + batch_size]]
        )
        batch = processor(text=[a + b for a, b in zip(texts, markers)], padding=True, return_tensors="pt")
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        guidance = {}
        if guidance_scale != 1.0:
            empty = processor.image_prompt.replace("{caption}", "")
            negative = processor(text=[empty + b for b in markers], padding=True, return_tensors="pt")
            guidance = {
                "guidance_scale": guidance_scale,
                "negative_prompt_ids": negative["input_ids"].to(model.device),
            }
        ids = model.generate(
            **inputs,
            mode="image",
            num_image_tokens=count - given,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": True, "top_k": None} | options | guidance,
        )
        codes.append(ids[:, inputs["input_ids"].shape[1] - given :].cpu() - first)
    return torch.cat(codes)


def evaluate_drawing(model, processor, decoder, image_processor, rows, tokens, run, output: Path) -> dict[str, Any]:
    """Draws every held-out caption, with and without guidance, completes images from their upper halves, and saves grids.

    Args:
        model, processor: an `LFQExpandedModel` and its `LFQProcessor`.
        decoder, image_processor: the VQGAN that made the codes, and its image processor.
        rows: held-out caption rows.
        tokens: codes of the same rows, a `CaptionTokens`.
        run: the recipe's arguments.
        output: folder for the grids `generated.png` and `completed.png`.

    Returns:
        codes_in_use: number of different codes in `tokens`.
        drawn: on procedural scenes only, the share of images with the right shapes and colours, for the drawn images and,
            for comparison, for true images, their reconstructions, and images drawn for another caption.
    """
    model.eval()
    captions = [row["caption"] for row in (rows[index] for index in range(len(rows)))]
    side = run.image_size // decoder.config.downsample_factor
    shape = (len(rows), side, side)
    true_codes = tokens.codes.view(shape)
    options = {"temperature": run.temperature}
    torch.manual_seed(run.seed)
    drawn = {"true images": [rows[index]["image"] for index in range(len(rows))]}
    drawn["their reconstructions"] = decode_images(decoder, image_processor, true_codes)
    plain = draw(model, processor, captions, None, side * side, **options)
    drawn["drawn"] = decode_images(decoder, image_processor, plain.view(shape))
    if run.guidance_scale != 1.0:
        guided = draw(model, processor, captions, None, side * side, guidance_scale=run.guidance_scale, **options)
        drawn[f"drawn, guidance {run.guidance_scale:g}"] = decode_images(decoder, image_processor, guided.view(shape))
    half = side * (side // 2)
    completed = draw(model, processor, captions, tokens.codes[:, :half], side * side, **options)
    drawn["completed upper half"] = decode_images(decoder, image_processor, completed.view(shape))
    best = list(drawn)[-2]
    picture_grid(captions, {name: drawn[name] for name in ("true images", "drawn", best)}, output / "generated.png")
    kept = [_upper_half(image) for image in drawn["their reconstructions"]]
    columns = {"given": kept, "completed": drawn["completed upper half"], "true": drawn["true images"]}
    picture_grid(captions, columns, output / "completed.png")
    report: dict[str, Any] = {"codes_in_use": int(true_codes.unique().numel())}
    if isinstance(rows, CaptionImages):
        reader = SceneReader(run.image_size, run.grid)
        shifted = drawn["drawn"][1:] + drawn["drawn"][:1]
        report["drawn"] = {
            name: _shares(reader, rows.scenes, pictures)
            for name, pictures in (drawn | {"drawn for another caption": shifted}).items()
        }
    return report


def _shares(reader: SceneReader, scenes, pictures) -> dict[str, float]:
    scores = [score_scene(scene, reader.read(image)) for scene, image in zip(scenes, pictures, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _upper_half(image: Image.Image) -> Image.Image:
    kept = Image.new("RGB", image.size, (128, 128, 128))
    kept.paste(image.crop((0, 0, image.width, image.height // 2)), (0, 0))
    return kept


def picture_grid(captions: Sequence[str], columns: dict[str, list[Image.Image]], path: Path, rows: int = 8) -> None:
    """Saves a sheet of captions with their images, one row per caption, in two blocks of at most `rows` rows."""
    size, text, gap = 96, 210, 6
    count = min(2 * rows, len(captions))
    block = text + len(columns) * (size + gap)
    lines = -(-count // 2)
    sheet = Image.new("RGB", (2 * block, 18 + lines * (size + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for index in range(count):
        left, top = (index // lines) * block, 18 + (index % lines) * (size + gap)
        pen.multiline_text((left + 4, top + 4), _wrapped(captions[index], 32), fill="black")
        for column, (name, pictures) in enumerate(columns.items()):
            x = left + text + column * (size + gap)
            pen.text((x, 2), name, fill="black")
            sheet.paste(pictures[index].convert("RGB").resize((size, size), Image.Resampling.NEAREST), (x, top))
    sheet.save(path, optimize=True)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
