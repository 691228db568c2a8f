"""Which vision tokens does the unpruned model read? Its attention, as a target for the scores of merger and pruners.

The gradient of the answers' loss reaches a token's score only while the token is kept, so heads trained by it alone
learn late, or wrongly, what they have dropped. The unpruned model's attention speaks of all tokens at once.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..models.modeling_pruned_vlm import PrunedVLM
from ..models.pruning_eager_copy import eager_copy


def attention_reader(model) -> tuple[PrunedVLM, list[torch.Tensor]]:
    """A copy of a `PrunedVLM` with the same weights, and a list that its next pass fills.

    The list gets the attention `(batch, heads, queries, keys)` of every decoder layer; the model itself is unchanged.
    """
    weights: list[torch.Tensor] = []
    reader = _same_parts(model)
    reader.base = _same_parts(model.base)
    reader.base.model = _same_parts(model.base.model)
    text = reader.base.model.language_model = eager_copy(model.adapter.text_model)
    reader.adapter = type(model.adapter)(reader.base)
    reader.adapter.text_config = text.config
    for layer in text.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1].detach()))
    return reader, weights


def _same_parts(module):
    """A copy of `module` whose children may be replaced without changing it."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


@contextlib.contextmanager
def reading_scores(model) -> Iterator[dict]:
    """Collects what the heads of a `PrunedVLM` say: `{"merger": [scores], "pruners": [(layer, logits, mask)]}`."""
    said: dict = {"merger": [], "pruners": []}
    handles = []
    if model.token_merger is not None:
        handles.append(
            model.token_merger.register_forward_hook(lambda module, args, output: said["merger"].append(output.scores))
        )
    if model.layer_pruner is not None:
        handles.append(
            model.layer_pruner.register_forward_hook(
                lambda module, args, kwargs, output: said["pruners"].append(
                    (args[0], output.keep_logits, kwargs["vision_mask"])
                ),
                with_kwargs=True,
            )
        )
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def read_share(attention: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """How much each position is read by the text: the largest weight over layers, heads and text positions.

    Args:
        attention: per layer `(batch, heads, length, length)`.
        text: bool `(batch, length)`, the queries that count.

    Returns:
        `(batch, length)` in [0, 1].
    """
    largest = torch.stack([layer.amax(1) for layer in attention]).amax(0)
    return largest.masked_fill(~text[:, :, None], 0.0).amax(1).float()


def guidance_loss(model, attention, said: dict, kept_index, input_ids, attention_mask) -> torch.Tensor:
    """Mean cross-entropy (nats) between the shares that the text reads and the heads' scores, over heads.

    Pruners before layer k learn what is read from layer k on. The merger's is a mean over images.

    Args:
        model: the `PrunedVLM`, whose last prompt is the one the heads spoke about.
        attention: per layer `(batch, heads, length, length)` of the unpruned model.
        said: what `reading_scores` collected.
        kept_index: of the model's output.
        input_ids, attention_mask: `(batch, length)`.
    """
    vision = input_ids == model.adapter.image_token_id
    text = attention_mask.bool() & ~vision
    losses = []
    if said["merger"]:
        # The merger takes images of one size together, in their order.
        shares = read_share(attention, text)[vision].split(model.image_tokens)
        parts = []
        for scores in said["merger"]:
            target = torch.stack([share for share in shares if len(share) == scores.shape[1]])
            mean = _cross_entropy(scores, target, torch.ones_like(target, dtype=torch.bool))
            parts.append(mean * len(target) / len(shares))
        losses.append(torch.stack(parts).sum())
    for layer, logits, mask in said["pruners"]:
        target = read_share(attention[layer:], text)
        target = target.gather(1, kept_index[layer].clamp(min=0))
        losses.append(_cross_entropy(logits, target, mask))
    return torch.stack(losses).mean() if losses else attention[0].new_zeros(())


def _cross_entropy(scores, target, mask) -> torch.Tensor:
    rows = mask.any(-1)
    target = (target * mask)[rows]
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    logs = F.log_softmax(scores.float().masked_fill(~mask, -1e9)[rows], dim=-1)
    return -(target * logs).sum(-1).mean()
