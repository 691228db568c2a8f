"""Attention guidance: merger and pruners learn to score each vision token as the unpruned model's text attends to it.

The gradient of the answers' loss reaches the score of a token only while the token is kept, so that heads trained by that
loss alone learn late, or wrongly, which dropped tokens matter. The attention of the unpruned model covers all tokens.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..models.modeling_pruned_vlm import PrunedVLM
from ..models.pruning_eager_copy import eager_copy


def attention_reader(model) -> tuple[PrunedVLM, list[torch.Tensor]]:
    """A view of a `PrunedVLM` that shares its weights, and a list that the view's next pass fills.

    The list receives the attention `(batch, heads, queries, keys)` of every decoder layer. The model is not changed.
    """
    weights: list[torch.Tensor] = []
    reader = _same_parts(model)
    reader.base = _same_parts(model.base)
    reader.base.model = _same_parts(model.base.model)
    text = reader.base.model.language_model = eager_copy(model.family.text_model)
    reader.family = type(model.family)(reader.base)
    reader.family.text_config = text.config
    for layer in text.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1].detach()))
    return reader, weights


def _same_parts(module):
    """A shallow copy of `module`: replacing a child of the copy leaves `module` as it was."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


@contextlib.contextmanager
def reading_scores(model) -> Iterator[dict]:
    """Collects the scores of a `PrunedVLM`'s heads: `{"merger": [scores], "pruners": [(layer, logits, mask)]}`."""
    scores: dict = {"merger": [], "pruners": []}
    handles = []
    if model.token_merger is not None:
        handles.append(
            model.token_merger.register_forward_hook(
                lambda module, args, output: scores["merger"].append(output.scores)
            )
        )
    if model.layer_pruner is not None:
        handles.append(
            model.layer_pruner.register_forward_hook(
                lambda module, args, kwargs, output: scores["pruners"].append(
                    (args[0], output.keep_logits, kwargs["vision_mask"])
                ),
                with_kwargs=True,
            )
        )
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def read_share(attention: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """How much the text attends to each position: the largest attention weight over layers, heads and text positions.

    Args:
        attention: per layer `(batch, heads, length, length)`.
        text: bool `(batch, length)`, True for the queries that count.

    Returns:
        `(batch, length)` in [0, 1].
    """
    largest = torch.stack([layer.amax(1) for layer in attention]).amax(0)
    return largest.masked_fill(~text[:, :, None], 0.0).amax(1).float()


def guidance_loss(model, attention, scores: dict, kept_index, input_ids, attention_mask) -> torch.Tensor:
    """−Σ_i a_i log softmax(scores)_i in nats, with the text's normalised attention a to the tokens; mean over heads.

    The pruner before layer k learns from the attention of layers k and later. The loss of the merger is a mean over images.

    Args:
        model: the `PrunedVLM`, whose last prompt was the scored one.
        attention: per layer `(batch, heads, length, length)` of the unpruned model.
        scores: what `reading_scores` collected.
        kept_index: `PrunedVLMOutput.kept_index` of the pass that was scored.
        input_ids, attention_mask: `(batch, length)`.
    """
    vision = input_ids == model.family.image_token_id
    text = attention_mask.bool() & ~vision
    losses = []
    if scores["merger"]:
        # The merger scores images of equal size together, in order.
        shares = read_share(attention, text)[vision].split(model.image_tokens)
        parts = []
        for logits in scores["merger"]:
            target = torch.stack([share for share in shares if len(share) == logits.shape[1]])
            mean = _cross_entropy(logits, target, torch.ones_like(target, dtype=torch.bool))
            parts.append(mean * len(target) / len(shares))
        losses.append(torch.stack(parts).sum())
    for layer, logits, mask in scores["pruners"]:
        target = read_share(attention[layer:], text)
        target = target.gather(1, kept_index[layer].clamp(min=0))
        losses.append(_cross_entropy(logits, target, mask))
    return torch.stack(losses).mean() if losses else attention[0].new_zeros(())


def _cross_entropy(logits, target, mask) -> torch.Tensor:
    rows = mask.any(-1)
    target = (target * mask)[rows]
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    logs = F.log_softmax(logits.float().masked_fill(~mask, -1e9)[rows], dim=-1)
    return -(target * logs).sum(-1).mean()
