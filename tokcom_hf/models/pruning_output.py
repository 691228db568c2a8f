"""What `PrunedVLM` returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .pruning_stream import PrunedCache


@dataclass
class PrunedVLMOutput(ModelOutput):
    """Result of `PrunedVLM`. Tensors of the input's length are aligned with the input and zero at removed places.

    Attributes:
        loss: mean cross-entropy over the labels.
        logits: `(batch, length, vocab)`.
        cache: the pruned KV cache, also as `past_key_values`.
        hidden_states: with `output_hidden_states=True`, per layer `(batch, length, hidden)`.
        soft_masks, keep_masks, keep_logits: per pruned layer `(batch, tokens that arrive there)`; masks are 1 on text.
        merge_weights: per group of equally large images `(images, n, m)`.
        merge_sparsity_loss: see `TokenMergerOutput.sparsity_loss`, mean over images.
        merge_entropy_loss: entropy of the assignment of tokens to centres, see `TokenMergerOutput.entropy_loss`.
        merge_kept_tokens: expected number of kept tokens, mean over images.
        keep_rates: per pruned layer `(batch,)`, the soft masks' share of kept tokens minus the budget's share.
        kept_index: per decoder layer `(batch, tokens)`, places in the input, -1 on padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: PrunedCache | None = None
    hidden_states: tuple | None = None
    soft_masks: tuple | None = None
    keep_masks: tuple | None = None
    keep_logits: tuple | None = None
    merge_weights: tuple | None = None
    merge_sparsity_loss: torch.Tensor | None = None
    merge_entropy_loss: torch.Tensor | None = None
    merge_kept_tokens: torch.Tensor | None = None
    keep_rates: tuple | None = None
    kept_index: tuple | None = None

    # The generation loop of transformers before 5.24 reads the cache as past_key_values.
    @property
    def past_key_values(self) -> PrunedCache | None:
        return self.cache

    def __getitem__(self, key):
        return super().__getitem__(_new_name(key))

    def __contains__(self, key) -> bool:
        return super().__contains__(_new_name(key))

    def get(self, key, default=None):
        return super().get(_new_name(key), default)


def _new_name(key):
    return "cache" if key == "past_key_values" else key
