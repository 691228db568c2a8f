"""How `LFQExpandedModel` adds ids to its base model: hooks on the base model's embedding and head.

Before the embedding, new ids are replaced by id 0; behind it, the rows of the new ids are put in place. Behind the head, the
logits of the new ids are appended. In a forward with labels, the head's input is recorded for the loss (lfq_loss.py).

A call leaves no state on the model, so threads may share one. Ids travel as an attribute of the embedding's input tensor;
what the loss needs is kept in a `LossCall` of the calling thread.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .lfq_rows import GradientSink

# `.call`: the `LossCall` of the forward that this thread is in.
_THREAD = threading.local()


@dataclass
class LossCall:
    """One forward with labels: input and output of the head.

    Attributes:
        model: the `LFQExpandedModel` whose forward it is.
        narrow: the head computes the last position only; one position shows whether the base model changes logits behind
            its head.
        hidden: the head's input `(batch, length, hidden)`.
        logits: the head's output, new ids included.
        gradient_sink: holds the loss's gradient of tied rows, to which the backward pass of the lookup adds its own.
    """

    model: torch.nn.Module
    narrow: bool
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    gradient_sink: GradientSink | None = None


@contextmanager
def caught(model: nn.Module, narrow: bool) -> Iterator[LossCall]:
    """Within this context the hooks of `model` record input and output of its head, for the calling thread."""
    before = getattr(_THREAD, "call", None)
    _THREAD.call = LossCall(model, narrow)
    try:
        yield _THREAD.call
    finally:
        _THREAD.call = before


class VocabularyHooks:
    """Hooks of one `LFQExpandedModel` on the embedding and the head of its base model.

    They look up `model.lfq_rows` at every call, because peft replaces that module.
    """

    def __init__(self, model):
        self.model = model

    def register(self, embedding: nn.Module, head: nn.Module) -> None:
        """Puts the hooks on the two modules."""
        embedding.register_forward_pre_hook(self.without_new_ids)
        embedding.register_forward_hook(self.with_new_rows)
        head.register_forward_pre_hook(self.catch_hidden)
        head.register_forward_hook(self.with_new_logits)

    def remove(self, *modules: nn.Module) -> None:
        """Removes the hooks from these modules."""
        for module in modules:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]

    def without_new_ids(self, module, args):
        ids = args[0]
        base_ids = ids.masked_fill(ids >= self.model.config.lfq_start_token_id, 0)
        # `with_new_rows` is given this tensor.
        base_ids.lfq_ids = ids
        return (base_ids, *args[1:])

    def with_new_rows(self, module, args, output):
        index = args[0].lfq_ids - self.model.config.lfq_start_token_id
        rows = self.model.lfq_rows(index.clamp(min=0), self._gradient_sink()).to(output)
        # Gemma scales embeddings inside its embedding layer.
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        return torch.where((index >= 0).unsqueeze(-1).to(output.device), rows, output)

    def _call(self) -> LossCall | None:
        """The forward with labels that the calling thread runs through this model, or None."""
        call = getattr(_THREAD, "call", None)
        return call if call is not None and call.model is self.model else None

    def _gradient_sink(self) -> GradientSink | None:
        """The sink of tied rows' gradients for this lookup; None where no loss follows.

        Used from step one: another summation order would break bitwise resume.
        """
        call = self._call()
        tied = (
            self.model.lfq_rows.head is None
            and self.model.lfq_rows.embedding.requires_grad
            and torch.is_grad_enabled()
        )
        if call is None or not tied or call.gradient_sink is not None:
            return None
        call.gradient_sink = GradientSink()
        return call.gradient_sink

    def catch_hidden(self, module, args):
        call = self._call()
        if call is None:
            return None
        call.hidden = args[0]
        return (args[0][:, -1:], *args[1:]) if call.narrow else None

    def with_new_logits(self, module, args, output):
        # `lfq_rows` is called as a module, because accelerate's hooks load offloaded weights in its forward.
        logits = torch.cat([output, self.model.lfq_rows(args[0], as_head=True).to(output)], dim=-1)
        call = self._call()
        if call is not None:
            call.logits = logits
        return logits
