"""Costs of a prompt, pruned and unpruned: vision tokens per layer, FLOPs (those of the heads included), KV memory."""

import threading
from dataclasses import dataclass, field

import torch

from .pruning_flops import (
    decoder_layer_flops,
    kv_cache_bytes,
    linear_flops,
    pruner_head_flops,
    token_merger_flops,
    vision_tower_flops,
)
from .pruning_strategies import STRATEGIES


@dataclass(frozen=True)
class PromptRecord:
    """Numbers of tokens in a pass over a prompt; the costs of the prompt follow from them.

    Attributes:
        mode: pruning mode.
        vision_tokens, text_tokens: `(batch,)`, number in each unpruned row.
        image_tokens: number of unpruned tokens of every image.
        sequences, windows, projected: work of the vision tower and the projector, see `ImageTokens`.
        question_tokens: `(rows,)`, number of text tokens that the heads read; `rows` counts beams.
        kept_index: per decoder layer `(rows, tokens)` original places, -1 on padding.
    """

    mode: str
    vision_tokens: torch.Tensor
    text_tokens: torch.Tensor
    image_tokens: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    projected: int = 0
    question_tokens: torch.Tensor | None = None
    kept_index: tuple[torch.Tensor, ...] = ()


class LastPrompt(threading.local):
    """The record of the calling thread's last prompt; a copy of the model starts without a record."""

    record: PromptRecord | None = None

    def __reduce__(self):
        return LastPrompt, ()


@dataclass(frozen=True)
class _Means:
    """Numbers of a prompt, as means over its rows.

    Attributes:
        mode: pruning mode.
        vision, text, question: unpruned vision tokens, text tokens, text tokens that the heads read.
        vision_per_layer: vision tokens that each layer saw.
        image_tokens: unpruned tokens of every image of all rows.
        rows: number of rows.
        tower_flops: FLOPs of the vision tower.
        projected: tokens that passed the projector, in families that reduce tokens behind it.
    """

    mode: str
    vision: float
    text: float
    question: float
    vision_per_layer: list[float]
    image_tokens: list
    rows: int
    tower_flops: float
    projected: float


def token_report(model, record: PromptRecord) -> dict:
    """Costs of a prompt, as means over its rows.

    Args:
        model: the `PrunedVLM`.
        record: record of the pass over the prompt.

    Returns:
        vision_tokens, text_tokens: numbers of tokens of the unpruned prompt.
        tokens_per_layer, vision_tokens_per_layer: numbers of tokens that each layer saw.
        vision_tokens_by_row: for every row, the number of vision tokens per layer.
        average_kept: mean over layers of the number of vision tokens, divided by the unpruned number.
        sequence_kept: mean over layers of the number of all tokens, divided by the unpruned number.
        flops, flops_origin: FLOPs of vision tower, projector, heads and language model together, pruned and unpruned.
        flops_parts: the FLOPs of each part, pruned.
        flops_ratio: flops / flops_origin.
        kv_bytes, kv_bytes_origin: size of the KV cache after the prompt, pruned and unpruned.
    """
    rows, kept_index = len(record.vision_tokens), record.kept_index
    assert record.question_tokens is not None
    text = float(record.text_tokens.float().mean())
    # Beams of a row stand side by side and keep the same tokens of the prompt.
    beams = len(kept_index[0]) // rows
    counts = torch.stack([(index[::beams] >= 0).sum(-1) for index in kept_index], 1) - record.text_tokens[:, None]
    towers = vision_tower_flops(model.base.config.vision_config, record.sequences, record.windows)
    means = _Means(
        mode=record.mode,
        vision=float(record.vision_tokens.float().mean()),
        text=text,
        question=float(record.question_tokens.float().mean()),
        # Counts are subtracted before they are averaged: the difference of two rounded means need not be a whole number.
        vision_per_layer=counts.cpu().double().mean(0).tolist(),
        image_tokens=record.image_tokens,
        rows=rows,
        tower_flops=towers / rows,
        projected=record.projected / rows,
    )
    return _report(model, means) | {"vision_tokens_by_row": counts.tolist()}


def predicted_report(
    model, vision: float, text: float, vision_per_layer: list[float], question: float | None = None
) -> dict:
    """The values of `token_report` for one image and given numbers of tokens, without running the model.

    Args:
        model: the `PrunedVLM`.
        vision, text: numbers of tokens of the unpruned prompt.
        vision_per_layer: number of vision tokens that each layer sees.
        question: number of text tokens that the heads read; None: all.
    """
    means = _Means(
        mode="hard",
        vision=vision,
        text=text,
        question=text if question is None else question,
        vision_per_layer=vision_per_layer,
        image_tokens=[vision],
        rows=1,
        tower_flops=vision_tower_flops(model.base.config.vision_config, _patches(model, vision)),
        projected=0.0 if model.family.reduces_before_projector else vision,
    )
    return _report(model, means)


def _report(model, means: _Means) -> dict:
    config, family = model.family.text_config, model.family
    seen, text, vision = means.vision_per_layer, means.text, means.vision
    parts = _parts(model, means)
    projected = vision if family.reduces_before_projector else means.projected
    origin = means.tower_flops + linear_flops(family.projector, projected)
    origin += len(seen) * decoder_layer_flops(config, text + vision)
    total = sum(parts.values())
    size = torch.finfo(model.base.dtype).bits // 8
    return {
        "vision_tokens": vision,
        "text_tokens": text,
        "vision_tokens_per_layer": seen,
        "tokens_per_layer": [text + n for n in seen],
        "average_kept": sum(seen) / len(seen) / vision if vision else 1.0,
        "sequence_kept": sum(text + n for n in seen) / len(seen) / (text + vision) if vision else 1.0,
        "flops": total,
        "flops_origin": origin,
        "flops_parts": parts,
        "flops_ratio": total / origin,
        "kv_bytes": kv_cache_bytes(config, [text + n for n in seen], size),
        "kv_bytes_origin": kv_cache_bytes(config, [text + vision] * len(seen), size),
    }


def _parts(model, means: _Means) -> dict[str, float]:
    """FLOPs of each part of the pruned model."""
    family, pruner, seen = model.family, model.layer_pruner, means.vision_per_layer
    merger = None if means.mode == "origin" else model.token_merger
    reduces = means.mode != "origin" and (model.config.strategy in STRATEGIES or merger is not None)
    entering = seen[0] if reduces else means.vision
    merging = 0.0
    if merger is not None:
        per_image = [
            token_merger_flops(merger, n, merger.tokens_kept(int(n)), means.question) for n in means.image_tokens
        ]
        merging = sum(per_image) / means.rows
    pruning = 0.0
    if pruner is not None and means.mode in ("soft", "hard") and means.vision:
        arriving = [seen[layer - 1] if layer else seen[0] for layer in pruner.config.layers]
        pruning = sum(pruner_head_flops(pruner, n, means.question) for n in arriving)
    return {
        "vision_tower": means.tower_flops,
        "projector": linear_flops(family.projector, entering if family.reduces_before_projector else means.projected),
        "token_merger": merging,
        "layer_pruner": pruning,
        "language_model": sum(decoder_layer_flops(family.text_config, means.text + n) for n in seen),
    }


def _patches(model, vision: float) -> int:
    """Patches of one image in the vision tower: more than tokens in families that shuffle or merge pixels."""
    config = model.base.config
    if hasattr(config, "downsample_ratio"):
        return round(vision / config.downsample_ratio**2) + 1
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    return round(vision * merge**2) if merge else round(vision) + 1
