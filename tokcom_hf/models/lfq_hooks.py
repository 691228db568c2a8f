"""What `LFQExpandedModel` hangs on its base model's embedding and head, and the loss that follows from it.

New ids are taken out before the base model's embedding sees them and their rows put in behind it; logits of new ids are
appended behind its head. In training the head's input is caught instead, and the loss computed in chunks over both tables.

Nothing of a call stays on the model: ids travel on the tensor that the embedding is given, and what the loss catches in an
object of the calling thread. So threads may share one model.
"""

import threading
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .lfq_rows import GradientHandover, vocabulary_of
from .shared_cross_entropy import split_cross_entropy

# `.call`: the `LossCall` of the forward that this thread is in.
_THREAD = threading.local()


@dataclass
class LossCall:
    """One forward with labels: what the head was given and gave.

    Attributes:
        model: the `LFQExpandedModel` whose forward it is.
        narrow: the head computes the last position only, which is enough to see whether the base model changes logits.
        hidden: the head's input `(batch, length, hidden)`.
        logits: the head's output, new ids included.
        handover: where the loss leaves its gradient of tied rows for the lookup to add to.
    """

    model: torch.nn.Module
    narrow: bool
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    handover: GradientHandover | None = None


class LFQHooks:
    """Mixed into `LFQExpandedModel`, which registers the hooks."""

    def _without_new_ids(self, module, args):
        ids = args[0]
        known = ids.masked_fill(ids >= self.config.lfq_start_token_id, 0)
        # The hook behind the embedding is given this same tensor.
        known.lfq_ids = ids
        return (known, *args[1:])

    def _with_new_rows(self, module, args, output):
        index = args[0].lfq_ids - self.config.lfq_start_token_id
        rows = self.lfq_rows(index.clamp(min=0), self._handover()).to(output)
        # Gemma multiplies embeddings inside its embedding layer; new rows live on the same scale.
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        return torch.where((index >= 0).unsqueeze(-1).to(output.device), rows, output)

    def _call(self) -> LossCall | None:
        """The forward with labels of this model that the calling thread is in."""
        call = getattr(_THREAD, "call", None)
        return call if call is not None and call.model is self else None

    def _handover(self) -> GradientHandover | None:
        """Where the loss leaves its gradient of tied rows for this lookup to add to; None where no loss follows.

        The same in the first step as in all later ones: another order of sums would show in a resumed run's last bit.
        """
        call = self._call()
        tied = self.lfq_rows.head is None and self.lfq_rows.embedding.requires_grad and torch.is_grad_enabled()
        if call is None or not tied or call.handover is not None:
            return None
        call.handover = GradientHandover()
        return call.handover

    def _catch_hidden(self, module, args):
        call = self._call()
        if call is None:
            return None
        call.hidden = args[0]
        return (args[0][:, -1:], *args[1:]) if call.narrow else None

    def _with_new_logits(self, module, args, output):
        # The rows' own forward, so that hooks which bring offloaded weights back run.
        logits = torch.cat([output, self.lfq_rows(args[0], as_head=True).to(output)], dim=-1)
        call = self._call()
        if call is not None:
            call.logits = logits
        return logits

    # ------------------------------------------------------------------ loss
    def _run(self, inputs: dict, narrow: bool):
        before = getattr(_THREAD, "call", None)
        call = _THREAD.call = LossCall(self, narrow)
        try:
            return self.base(**inputs), call
        finally:
            _THREAD.call = before

    def _tables_at_hand(self) -> bool:
        """Whether old and new rows are in memory: offloaded weights exist only while their own module runs."""
        modules = (vocabulary_of(self.base)[1], self.lfq_rows)
        return not any(parameter.is_meta for module in modules for parameter in module.parameters())

    def _loss(self, logits, call: LossCall, labels, num_items):
        hidden = call.hidden
        shifted = labels[:, 1:].reshape(-1).to(hidden.device)
        plain = self._plain_head is True or (self._plain_head is None and self._same_head(logits, hidden))
        if not plain or not self._tables_at_hand():
            # The base model changes logits after its head: its own formula has to be kept, at the price of full logits.
            sum_or_mean = "mean" if num_items is None else "sum"
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(flat, shifted.to(flat.device), reduction=sum_or_mean)
            return loss if num_items is None else loss / num_items
        _, head = vocabulary_of(self.base)
        tables = [(head.weight, getattr(head, "bias", None)), self.lfq_rows.tables()]
        tables = [tuple(None if table is None else table.to(hidden.device) for table in pair) for pair in tables]
        states, handover = hidden[:, :-1].flatten(0, 1), None if call.handover is None else call.handover.gradients
        return split_cross_entropy(states, tables, shifted, num_items=num_items, handover=handover)

    def _same_head(self, logits, hidden) -> bool:
        with torch.no_grad():
            last = vocabulary_of(self.base)[1](hidden[:, -1:])
        return torch.allclose(logits[:, -1:].float(), last.float(), rtol=1e-4, atol=1e-5)
