"""What a prompt cost: vision tokens per layer, FLOPs with the heads' own, KV memory, against the unpruned model."""

import threading

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


class LastPrompt(threading.local):
    """Arguments of `token_report` for the last prompt of the thread that asks; a copy of the model starts with none."""

    report: dict | None = None

    def __reduce__(self):
        return LastPrompt, ()


def token_report(
    model, vision_tokens, text_tokens, image_tokens, tower, projected, kept_index, question, mode: str
) -> dict:
    """What the last prompt cost, averaged over its rows.

    Args:
        model: the `PrunedVLM`.
        vision_tokens, text_tokens: of the unpruned rows, `(batch,)`.
        image_tokens: unpruned tokens of every image.
        tower, projected: what the vision tower worked on, see `pruning_families.ImageTokens`.
        kept_index: per layer `(batch, tokens)`, -1 on padding.
        question: text tokens the heads may read, `(batch,)`.
        mode: pruning mode.

    Returns:
        vision_tokens, text_tokens: of the unpruned prompt.
        tokens_per_layer, vision_tokens_per_layer: what each layer really saw.
        vision_tokens_by_row: the same for every row, a list of numbers per layer.
        average_kept: mean over layers of vision tokens, divided by the unpruned number.
        flops, flops_origin: totals of vision tower, projector, heads and language model for the prompt.
        flops_parts: the pruned total by part.
        flops_ratio: flops / flops_origin.
        kv_bytes, kv_bytes_origin: cache after the prompt.
    """
    rows = len(vision_tokens)
    per_layer = [float((index >= 0).sum(-1).float().mean()) for index in kept_index]
    vision = float(vision_tokens.float().mean())
    text = float(text_tokens.float().mean())
    seen = [tokens - text for tokens in per_layer]
    asked = float(question.float().mean())
    towers = vision_tower_flops(model.base.config.vision_config, *tower)
    # Beams of a row stand side by side and keep the same tokens of the prompt.
    beams = len(kept_index[0]) // rows
    counts = torch.stack([(index[::beams] >= 0).sum(-1) for index in kept_index], 1) - text_tokens[:, None]
    report = _report(model, vision, text, seen, asked, mode, image_tokens, rows, towers / rows, projected / rows)
    return report | {"vision_tokens_by_row": counts.tolist()}


def predicted_report(
    model, vision: float, text: float, vision_per_layer: list[float], question: float | None = None
) -> dict:
    """The same table for token counts given by hand, of one image, without running the model."""
    towers = vision_tower_flops(model.base.config.vision_config, _patches(model, vision))
    projected = 0.0 if model.adapter.reduces_before_projector else vision
    asked = text if question is None else question
    return _report(model, vision, text, vision_per_layer, asked, "hard", [vision], 1, towers, projected)


def _report(model, vision, text, seen, asked, mode, image_tokens, rows, towers, projected) -> dict:
    config, adapter = model.adapter.text_config, model.adapter
    reduces = mode != "origin" and (model.config.strategy in STRATEGIES or model.token_merger is not None)
    before = adapter.reduces_before_projector
    entering = seen[0] if reduces else vision
    merger = model.token_merger if mode != "origin" else None
    merged = 0.0
    if merger is not None:
        merged = sum(token_merger_flops(merger, n, merger.tokens_kept(int(n)), asked) for n in image_tokens) / rows
    parts = {
        "vision_tower": towers,
        "projector": linear_flops(adapter.projector, entering if before else projected),
        "token_merger": merged,
        "layer_pruner": 0.0,
        "language_model": sum(decoder_layer_flops(config, text + n) for n in seen),
    }
    if model.layer_pruner is not None and mode in ("soft", "hard") and vision:
        arriving = [seen[layer - 1] if layer else seen[0] for layer in model.layer_pruner.config.layers]
        parts["layer_pruner"] = sum(pruner_head_flops(model.layer_pruner, n, asked) for n in arriving)
    origin = towers + linear_flops(adapter.projector, vision if before else projected)
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


def _patches(model, vision: float) -> int:
    """Patches the tower works on for one image; families that shuffle or merge pixels have more patches than tokens."""
    config = model.base.config
    if hasattr(config, "downsample_ratio"):
        return round(vision / config.downsample_ratio**2) + 1
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    return round(vision * merge**2) if merge else round(vision) + 1
