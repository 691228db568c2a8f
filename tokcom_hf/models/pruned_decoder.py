"""The decoder loop of `PrunedVLM`: layer after layer, with fewer and fewer vision tokens."""

import contextlib
from dataclasses import replace

import torch

from .cache_name import CACHE
from .token_removal import PrunedCache, Segment, Stream, attention_mask
from .vlm_adapters import eager_attention


def run_layers(
    model, stream: Stream, mode: str, cache: PrunedCache | None, collected: dict, states: list | None, length: int
) -> Stream:
    """Runs a prompt through all layers.

    Args:
        model: the `PrunedVLM`.
        stream: the embedded prompt.
        mode: pruning mode; stage 2 works in `soft` and `hard`.
        cache: filled with keys, values and one `Segment` per run of layers with the same tokens.
        collected: lists that the masks, logits and kept places of each layer are appended to.
        states: list that the input of every layer is appended to, `(batch, length, hidden)`, or None.
        length: original length of the prompt.
    """
    text, config = model.adapter.text_model, model.adapter.text_config
    pruner = model.layer_pruner if mode in ("soft", "hard") else None
    fastv = model.config.strategy_layer if model.config.strategy == "fastv" and mode != "origin" else None
    bias: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    changed = True
    for number, layer in enumerate(text.layers):
        reads = fastv == number + 1
        if pruner is not None and number in pruner.config.layers and bool(stream.vision.any()):
            before = stream
            stream, bias = _prune(model, number, stream, bias, mode, collected)
            changed |= stream is not before or mode == "soft"
        if fastv == number:
            assert attention is not None
            stream = stream.keep(~stream.vision | _most_attended(attention, stream, model.config.keep))
            changed = True
        if changed or reads:
            # Eager attention wants the mask as numbers; a bias of zeros makes it so.
            added = stream.hidden.new_zeros(stream.mask.shape) if reads and bias is None else bias
            with eager_attention(config) if reads else contextlib.nullcontext():
                mask = attention_mask(config, stream.hidden, stream.mask, added, cache, number)
            rotary = text.rotary_emb(stream.hidden, position_ids=stream.positions)
            if cache is not None:
                cache.segments.append(Segment(number, stream.mask, bias))
            changed = False
        collected["kept_index"].append(stream.index.masked_fill(~stream.mask, -1))
        if states is not None:
            states.append(stream.restore(stream.hidden, length))
        inputs = {
            "attention_mask": mask,
            "position_embeddings": rotary,
            CACHE: cache,
            "use_cache": cache is not None,
        }
        if reads:
            with eager_attention(config), _read_attention(layer) as weights:
                hidden = layer(stream.hidden, **inputs)
            attention = weights[0]
        else:
            hidden = layer(stream.hidden, **inputs)
        stream = replace(stream, hidden=hidden)
    return stream


def decode(adapter, hidden: torch.Tensor, cache: PrunedCache) -> torch.Tensor:
    """Runs embedded new tokens `(batch, new, hidden)` against the cache; each run of layers has its own keys."""
    assert cache.next_position is not None
    text = adapter.text_model
    positions = cache.next_position[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
    cache.next_position = positions[:, -1] + 1
    if adapter.three_axes:
        positions = positions.expand(3, *positions.shape)
    cache.extend(hidden.shape[1])
    rotary = text.rotary_emb(hidden, position_ids=positions)
    segments = {segment.start: segment for segment in cache.segments}
    mask = None
    for number, layer in enumerate(text.layers):
        if number in segments:
            segment = segments[number]
            mask = attention_mask(adapter.text_config, hidden, segment.mask, segment.bias, cache, number)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=True, **{CACHE: cache})
    return text.norm(hidden)


def _prune(model, number: int, stream: Stream, bias: torch.Tensor | None, mode: str, collected: dict):
    alive = collected["keep_masks"][-1] if mode == "soft" and collected["keep_masks"] else None
    decision = model.layer_pruner(
        number,
        stream.hidden,
        stream.hidden,
        stream.question,
        # A token that an earlier layer dropped stays dropped, also where soft mode still carries it along.
        vision_mask=stream.vision if alive is None else stream.vision & alive,
        images=stream.images.clamp(min=0),
        temperature=model.temperature,
    )
    keep = decision.keep_mask | ~stream.vision
    soft = torch.where(stream.vision, decision.soft_mask, 1.0)
    tokens = stream.vision.sum(-1).clamp(min=1)
    collected["keep_rates"].append((decision.soft_mask.sum(-1) - decision.target) / tokens)
    collected["soft_masks"].append(soft)
    collected["keep_masks"].append(keep)
    collected["keep_logits"].append(decision.keep_logits)
    if mode == "hard":
        return stream.keep(keep), None
    added = soft.clamp(min=torch.finfo(torch.float32).tiny).log()
    return stream, added if bias is None else bias + added


@contextlib.contextmanager
def _read_attention(layer):
    weights: list[torch.Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    try:
        yield weights
    finally:
        handle.remove()


def _most_attended(attention: torch.Tensor, stream: Stream, keep: int) -> torch.Tensor:
    """FastV (arXiv 2403.06764): the vision tokens the last text token attends to most, `keep` per image."""
    places = torch.arange(stream.mask.shape[1], device=stream.mask.device)
    last = (places * stream.mask).amax(-1)
    received = attention.mean(1)[torch.arange(len(last), device=last.device), last]
    received = received.masked_fill(~stream.vision, -1.0)
    images = stream.images.amax(-1) + 1
    available = stream.vision.sum(-1)
    if bool((keep * images > available).any()):
        raise ValueError(
            f"keep={keep} is more than the image's {int((available / images.clamp(min=1)).min())} tokens."
        )
    rank = received.argsort(-1, descending=True).argsort(-1)
    return stream.vision & (rank < (keep * images)[:, None])
