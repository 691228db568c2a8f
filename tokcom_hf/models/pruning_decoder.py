"""The decoder loop of `PrunedVLM`, in which layers see fewer and fewer vision tokens."""

from dataclasses import replace

import torch

from .pruning_eager_copy import eager_copy
from .pruning_stream import Prompt, PrunedCache, Segment, Stream, attention_mask
from .shared_cache_name import CACHE


def run_prompt(
    model, prompt: Prompt, cache: PrunedCache | None, states: list | None, length: int
) -> tuple[torch.Tensor, dict]:
    """Runs a prompt through the language model.

    Args:
        model: the `PrunedVLM`.
        prompt: the embedded prompt.
        cache: receives keys and values of every layer; None: nothing is cached.
        states: list to which the input of every layer and the final states are appended, or None.
        length: length of the prompt before pruning.

    Returns:
        Final hidden states `(batch, length, hidden)`, and the fields of `PrunedVLMOutput` about pruning.
    """
    stream, mode = prompt.stream, prompt.record.mode
    if model.family.window is not None:
        model.family.check_window(int(stream.positions.max()) + 1)
    if cache is not None:
        cache.next_position = stream.positions.reshape(-1, *stream.positions.shape[-2:]).amax((0, -1)) + 1
        cache.mode = mode
    names = ("soft_masks", "keep_masks", "keep_logits", "keep_rates", "kept_index")
    collected: dict[str, list] = {name: [] for name in names}
    stream = run_layers(model, stream, mode, cache, collected, states, length)
    record = replace(prompt.record, kept_index=tuple(collected["kept_index"]), question_tokens=stream.question.sum(-1))
    model.last_prompt.record = record
    if cache is not None:
        cache.record = record
    hidden = stream.restore(model.family.text_model.norm(stream.hidden), length)
    if states is not None:
        states.append(hidden)
    return hidden, prompt.merged | {name: tuple(values) or None for name, values in collected.items()}


def run_layers(
    model, stream: Stream, mode: str, cache: PrunedCache | None, collected: dict, states: list | None, length: int
) -> Stream:
    """Runs a prompt through all layers.

    Args:
        model: the `PrunedVLM`.
        stream: the embedded prompt.
        mode: pruning mode; stage 2 works in `soft` and `hard`.
        cache: filled with keys, values and one `Segment` per run of layers with the same tokens.
        collected: lists to which the masks, logits and kept places of each layer are appended.
        states: list to which the input `(batch, length, hidden)` of every layer is appended, or None.
        length: length of the prompt before pruning.
    """
    text, config = model.family.text_model, model.family.text_config
    pruner = model.layer_pruner if mode in ("soft", "hard") else None
    fastv = model.config.strategy_layer if model.config.strategy == "fastv" and mode != "origin" else None
    bias: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    changed = True
    for number, layer in enumerate(text.layers):
        reads_attention = fastv == number + 1
        layer = eager_copy(layer) if reads_attention else layer
        if pruner is not None and number in pruner.config.layers and bool(stream.vision.any()):
            before = stream
            stream, bias = _prune(model, number, stream, bias, mode, collected)
            changed |= stream is not before or mode == "soft"
        if fastv == number:
            assert attention is not None
            stream = stream.keep(~stream.vision | _most_attended(attention, stream, model.config.keep))
            changed = True
        if changed or reads_attention:
            # Eager attention needs a floating-point mask, and a bias makes the mask one.
            added = stream.hidden.new_zeros(stream.mask.shape) if reads_attention and bias is None else bias
            text_config = layer.self_attn.config if reads_attention else config
            mask = attention_mask(text_config, stream.hidden, stream.mask, added, cache, number)
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
        if reads_attention:
            hidden, attention = _with_attention(layer, stream.hidden, inputs)
        else:
            hidden = layer(stream.hidden, **inputs)
        stream = replace(stream, hidden=hidden)
    return stream


def decode(
    model,
    input_ids: torch.Tensor,
    cache: PrunedCache,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    states: list | None = None,
) -> tuple[torch.Tensor, dict]:
    """Runs new tokens against the cache, whose layers hold different keys.

    Args:
        model: the `PrunedVLM`.
        input_ids: new tokens `(batch, new)`.
        mask: `(batch, at least new)`, whose last columns are 0 on padding among the new tokens.
        positions: rotary positions `(batch, new)` or `(3, batch, new)`; by default they continue those of the prompt.
        states: list to which the input of every layer and the final states are appended, or None.

    Returns:
        Final hidden states `(batch, new, hidden)`, and an empty dictionary in place of the fields that `run_prompt` returns.
    """
    assert cache.next_position is not None
    family, hidden = model.family, model.get_input_embeddings()(input_ids)
    text, new = family.text_model, hidden.shape[1]
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask is not None:
        if mask.shape[-1] < new or len(mask) != len(hidden):
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} is too small for {tuple(hidden.shape[:2])} new tokens."
            )
        real = mask[:, -new:].bool().to(hidden.device)
    if positions is None:
        positions = cache.next_position[:, None] + (real.long().cumsum(-1) - 1).clamp(min=0)
    cache.next_position = positions.reshape(-1, *positions.shape[-2:]).amax((0, -1)) + 1
    if family.three_axes and positions.dim() == 2:
        positions = positions.expand(3, *positions.shape)
    if family.window is not None:
        family.check_window(int(cache.next_position.max()))
    cache.extend(real)
    rotary = text.rotary_emb(hidden, position_ids=positions)
    segments = {segment.start: segment for segment in cache.segments}
    built = None
    for number, layer in enumerate(text.layers):
        if states is not None:
            states.append(hidden)
        if number in segments:
            segment = segments[number]
            built = attention_mask(family.text_config, hidden, segment.mask, segment.bias, cache, number)
        hidden = layer(hidden, attention_mask=built, position_embeddings=rotary, use_cache=True, **{CACHE: cache})
    hidden = text.norm(hidden)
    if states is not None:
        states.append(hidden)
    return hidden, {}


def _prune(model, number: int, stream: Stream, bias: torch.Tensor | None, mode: str, collected: dict):
    """Stage 2 before layer `number`: the stream without dropped tokens (`hard`), or with log(mask) in its bias (`soft`)."""
    alive = collected["keep_masks"][-1] if mode == "soft" and collected["keep_masks"] else None
    decision = model.layer_pruner(
        number,
        stream.hidden,
        stream.hidden,
        stream.question,
        # In soft mode tokens that an earlier layer dropped are still in the stream; they stay dropped.
        vision_mask=stream.vision if alive is None else stream.vision & alive,
        images=stream.images.clamp(min=0),
        temperature=model.temperature,
        return_dict=True,
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


def _with_attention(layer, hidden: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of an `eager_copy` of a layer, and its attention weights `(batch, heads, queries, keys)`."""
    weights: list[torch.Tensor] = []
    layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    return layer(hidden, **inputs), weights[0]


def _most_attended(attention: torch.Tensor, stream: Stream, keep: int) -> torch.Tensor:
    """FastV (arXiv 2403.06764): mask of the vision tokens to which the last token attends most, `keep` per image."""
    places = torch.arange(stream.mask.shape[1], device=stream.mask.device)
    last = (places * stream.mask).amax(-1)
    received = attention.mean(1)[torch.arange(len(last), device=last.device), last]
    received = received.masked_fill(~stream.vision, -1.0)
    # A row's budget is the sum over its images of `keep`, or of the image's tokens where it has fewer.
    numbers = torch.arange(int(stream.images.max()) + 1, device=stream.mask.device)
    tokens = (stream.images[..., None] == numbers).sum(1)
    budget = tokens.clamp(max=keep).sum(-1)
    rank = received.argsort(-1, descending=True).argsort(-1)
    return stream.vision & (rank < budget[:, None])
