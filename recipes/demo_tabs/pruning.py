"""Tab "Pruning": a question about a picture, answered with all and with few vision tokens, by a `PrunedVLM`."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.data.vqa_sources import scene_options
from tokcom_hf.models.shared_image_files import read_image
from tokcom_hf.plots.pruning import dimmed, kept_grids

PICTURE = 336  # pixels a side of the pictures shown
CAPTION = 48  # extra pixels below each picture, which the page covers with its caption


def example_question(folder: str, seed: int) -> tuple[Image.Image, str, str]:
    """Picture, question and true answer, of the kind that the model in the folder was trained on by default."""
    row = scene_rows(5, seed, **scene_options(folder))[seed % 5]
    return row["image"], row["questions"][0], row["answers"][0][0]


def set_budget(model: Any, tokens: int, share: float) -> None:
    """Sets the share of an image's `tokens` vision tokens that enter the language model (at least one token).

    Layer pruners keep the same proportion of these tokens as in training.

    Args:
        model: `PrunedVLM`; its merger's and pruners' own configurations are changed in place, while
            `model.config.token_merger` and `model.config.layer_pruner` keep the trained budgets.
    """
    config, budget = model.config, max(1, round(share * tokens))
    if config.strategy is not None:
        config.keep = budget
    trained = tokens
    if model.token_merger is not None:
        stage = config.token_merger
        trained = min(tokens, stage["target_merge_tokens"] or max(1, round(stage["merge_ratio"] * tokens)))
        model.token_merger.config.target_merge_tokens = budget
    if model.layer_pruner is not None and config.layer_pruner["keep_tokens"]:
        keep = config.layer_pruner["keep_tokens"]
        if model.token_merger is None:
            trained = keep[0]
        model.layer_pruner.config.keep_tokens = [max(1, round(budget * kept / trained)) for kept in keep]


def answer(
    pipe: Any, image: Image.Image | None, question: str, share: float, prompt: str = "<image> {question}"
) -> tuple[list[tuple[Image.Image, str]], str]:
    """The unpruned and the pruned answer to a question, their cost, and the kept patches.

    Args:
        pipe: `pruned-image-text-to-text` pipeline.
        share: part of the vision tokens that enters the language model, in (0, 1].
        prompt: text with `<image>` and `{question}` in it.

    Returns:
        One picture with caption per layer that removes tokens, with removed patches darkened; and a Markdown table.

    Raises:
        ValueError: no picture or no question.
    """
    if image is None or not question.strip():
        raise ValueError("Give an image and a question about it, or draw an example.")
    model, side = pipe.model, min(image.size)
    # Cropped to a square, so that the picture shown is what the image processor leaves of it, up to its size.
    image = ImageOps.fit(read_image(image), (side, side))
    request = {"image": image, "text": prompt.replace("{question}", question)}
    ask = {"max_new_tokens": 16, "allow_urls": False}
    unpruned = pipe(request, pruning_mode="origin", **ask)
    tokens = round(unpruned["token_report"]["vision_tokens"])
    set_budget(model, tokens, share)
    pruned = pipe(request, pruning_mode="hard", **ask)
    row = {"image": image, "questions": [question], "answers": [[""]]}
    model.pruning_mode = "hard"
    grids = kept_grids(model, VQACollator(pipe.processor, prompt, answers=False)([row]))
    shown = np.asarray(image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST))
    pictures = []
    for layer, grid in grids:
        picture = Image.new("RGBA", (PICTURE, PICTURE + CAPTION))
        picture.paste(Image.fromarray(dimmed(shown, grid)))
        pictures.append((picture, f"layer {layer}: {int(grid.sum())} of {tokens} kept"))
    notes = _unknown_words(pipe.processor.tokenizer, question)
    if not pictures:
        notes += "\n\nNo picture: this model's tokens make no square grid of patches."
    return pictures, _table(unpruned, pruned) + notes


def _table(unpruned: dict[str, Any], pruned: dict[str, Any]) -> str:
    lines = ["| | unpruned | pruned |", "|---|---:|---:|"]
    lines.append(f"| **answer** | **{unpruned['generated_text']}** | **{pruned['generated_text']}** |")
    reports = [unpruned["token_report"], pruned["token_report"]]
    scale, unit = (
        (1e12, "T") if reports[0]["flops"] > 1e12 else (1e9, "G") if reports[0]["flops"] > 1e9 else (1e6, "M")
    )
    flops = [f"{report['flops'] / scale:.3g} {unit} ({report['flops_ratio']:.1%})" for report in reports]
    layers = [" ".join(f"{n:.0f}" for n in report["vision_tokens_per_layer"]) for report in reports]
    memory = [f"{report['kv_bytes'] / 1024:,.0f} KiB" for report in reports]
    for name, values in (("FLOPs of the prompt", flops), ("vision tokens per layer", layers), ("KV cache", memory)):
        lines.append(f"| {name} | {values[0]} | {values[1]} |")
    return "\n".join(lines)


def _unknown_words(tokenizer: Any, question: str) -> str:
    """A sentence that names the words missing from the tokenizer's vocabulary; empty if there are none."""
    if tokenizer.unk_token is None:
        return ""
    unknown = [word for word in question.split() if tokenizer.unk_token in tokenizer.tokenize(word)]
    return f"\n\nNot in the model's vocabulary: {', '.join(unknown)}." if unknown else ""
