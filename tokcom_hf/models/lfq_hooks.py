"""What `LFQExpandedModel` hangs on its base model's embedding and head, and the loss that follows from it.

New ids are taken out before the base model's embedding sees them and their rows put in behind it; logits of new ids are
appended behind its head. In training the head's input is caught instead, and the loss computed in chunks over both tables.
"""

import torch
from torch.nn import functional as F

from .chunked_cross_entropy import split_cross_entropy
from .lfq_rows import vocabulary_of


class LFQHooks:
    """Mixed into `LFQExpandedModel`, which registers the hooks."""

    def _without_new_ids(self, module, args):
        ids = args[0]
        self._ids.append(ids)
        return (ids.masked_fill(ids >= self.config.lfq_start_token_id, 0), *args[1:])

    def _with_new_rows(self, module, args, output):
        index = self._ids.pop() - self.config.lfq_start_token_id
        rows = self.lfq_rows(index.clamp(min=0), self._handover()).to(output.dtype)
        # Gemma multiplies embeddings inside its embedding layer; new rows live on the same scale.
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        return torch.where((index >= 0).unsqueeze(-1), rows, output)

    def _handover(self) -> dict | None:
        """Where the loss leaves its gradient of tied rows for this lookup to add to; None where no loss follows.

        The same in the first step as in all later ones: another order of sums would show in a resumed run's last bit.
        """
        tied = self.lfq_rows.head is None and self.lfq_rows.embedding.requires_grad and torch.is_grad_enabled()
        if not tied or self._caught is None or "handover" in self._caught:
            return None
        self._caught["handover"] = {}
        return self._caught["handover"]

    def _catch_hidden(self, module, args):
        if self._caught is None:
            return None
        self._caught["hidden"] = args[0]
        # One position is enough to see whether the base model changes what its head returns.
        return (args[0][:, -1:], *args[1:]) if self._caught["narrow"] else None

    def _with_new_logits(self, module, args, output):
        weight, bias = self.lfq_rows.tables()
        dtype = args[0].dtype
        new = F.linear(args[0], weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = torch.cat([output, new.to(output.dtype)], dim=-1)
        if self._caught is not None:
            self._caught["logits"] = logits
        return logits

    # ------------------------------------------------------------------ loss
    def _run(self, inputs: dict, narrow: bool):
        self._caught = {"narrow": narrow}
        try:
            return self.base(**inputs), self._caught
        finally:
            self._caught = None

    def _loss(self, logits, caught, labels, num_items):
        hidden = caught["hidden"]
        shifted = labels[:, 1:].reshape(-1).to(hidden.device)
        if self._plain_head is False or (self._plain_head is None and not self._same_head(logits, hidden)):
            # The base model changes logits after its head: its own formula has to be kept, at the price of full logits.
            sum_or_mean = "mean" if num_items is None else "sum"
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(flat, shifted, reduction=sum_or_mean)
            return loss if num_items is None else loss / num_items
        _, head = vocabulary_of(self.base)
        tables = [(head.weight, getattr(head, "bias", None)), self.lfq_rows.tables()]
        states, handover = hidden[:, :-1].flatten(0, 1), caught.get("handover")
        return split_cross_entropy(states, tables, shifted, num_items=num_items, handover=handover)

    def _same_head(self, logits, hidden) -> bool:
        with torch.no_grad():
            last = vocabulary_of(self.base)[1](hidden[:, -1:])
        return torch.allclose(logits[:, -1:].float(), last.float(), rtol=1e-4, atol=1e-5)
