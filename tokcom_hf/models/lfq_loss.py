"""The loss of an `LFQExpandedModel`, computed in chunks from the head's input, so that all logits never exist at once."""

import torch
from torch import nn
from torch.nn import functional as F

from .lfq_hooks import LossCall, caught
from .lfq_rows import vocabulary_of
from .shared_cross_entropy import split_cross_entropy


def forward_with_loss(
    model, inputs: dict, labels: torch.Tensor, num_items: torch.Tensor | int | None, return_logits: bool
):
    """The base model's output with the loss in it.

    Args:
        model: the `LFQExpandedModel`. Its `plain_head`, None before the first loss, tells whether the base model's logits
            are what its head returns: no soft cap, no scale.
        inputs: keywords of the base model's forward.
        labels: `(batch, length)` ids, -100 where there is nothing to predict.
        num_items: divisor of the summed loss; the mean over labels where None.
        return_logits: also return the logits.
    """
    inputs = dict(inputs)
    keep = inputs.pop("logits_to_keep", None)
    if keep is not None and not return_logits:
        raise ValueError("logits_to_keep beside labels needs return_logits=True: a loss is computed without logits.")
    if "use_cache" in model.keywords and model.cache_keyword not in inputs:
        inputs.setdefault("use_cache", False)
    narrow = not return_logits and model.plain_head is not False and _in_memory(model)
    output, call = _run(model, inputs, narrow)
    if model.plain_head is None and narrow:
        model.plain_head = torch.equal(output.logits.float(), call.logits.float())
        if not model.plain_head:
            output, call = _run(model, inputs, narrow=False)
    values = dict(output.items())
    values["loss"] = _loss(model, output.logits, call, labels, num_items)
    if not return_logits:
        del values["logits"]
    elif keep is not None:
        places = keep if isinstance(keep, torch.Tensor) else slice(-keep, None) if keep else slice(None)
        values["logits"] = output.logits[:, places]
    return type(output)(**values)


def _run(model, inputs: dict, narrow: bool):
    with caught(model, narrow) as call:
        return model.base(**inputs), call


def _in_memory(model) -> bool:
    """Whether old and new rows are in memory; offloaded weights are in memory only while their module runs."""
    modules = (vocabulary_of(model.base)[1], model.lfq_rows)
    return not any(parameter.is_meta for module in modules for parameter in module.parameters())


def _loss(model, logits: torch.Tensor, call: LossCall, labels: torch.Tensor, num_items) -> torch.Tensor:
    hidden = call.hidden
    assert hidden is not None
    shifted = labels[:, 1:].reshape(-1).to(hidden.device)
    _, head = vocabulary_of(model.base)
    plain = model.plain_head is True or (model.plain_head is None and _is_plain(head, logits, hidden))
    if not plain or not _in_memory(model):
        # The base model changes logits behind its head (or weights are offloaded): use its full logits.
        flat = logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(flat, shifted.to(flat.device), reduction="mean" if num_items is None else "sum")
        return loss if num_items is None else loss / num_items
    tables = [(head.weight, getattr(head, "bias", None)), model.lfq_rows.tables()]
    tables = [tuple(None if table is None else table.to(hidden.device) for table in pair) for pair in tables]
    sink = None if call.gradient_sink is None else call.gradient_sink.gradients
    return split_cross_entropy(hidden[:, :-1].flatten(0, 1), tables, shifted, num_items=num_items, gradient_sink=sink)


@torch.no_grad()
def _is_plain(head: nn.Module, logits: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether the logits of the last position are the head's own output for that position."""
    return torch.allclose(logits[:, -1:].float(), head(hidden[:, -1:]).float(), rtol=1e-4, atol=1e-5)
