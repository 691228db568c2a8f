"""What `PrunedVLM` returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .token_removal import PrunedCache


@dataclass
class PrunedVLMOutput(ModelOutput):
    """Result of `PrunedVLM`; everything with a length axis is aligned with the input, removed places are zero.

    Attributes:
        loss: mean cross-entropy over the labels.
        logits: `(batch, length, vocab)`.
        past_key_values: the pruned cache.
        hidden_states: per layer `(batch, length, hidden)`, with `output_hidden_states=True`.
        soft_masks, keep_masks, keep_logits: per pruned layer `(batch, length)` over the tokens at that layer; 1 on text.
        merge_weights: per group of equally large images `(images, n, m)`.
        merge_sparsity_loss: scalar.
        keep_rates: per pruned layer, soft share kept over the budget's share, `(batch,)`.
        kept_index: per decoder layer, original places `(batch, tokens)` (-1 on padding).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: PrunedCache | None = None
    hidden_states: tuple | None = None
    soft_masks: tuple | None = None
    keep_masks: tuple | None = None
    keep_logits: tuple | None = None
    merge_weights: tuple | None = None
    merge_sparsity_loss: torch.Tensor | None = None
    keep_rates: tuple | None = None
    kept_index: tuple | None = None
