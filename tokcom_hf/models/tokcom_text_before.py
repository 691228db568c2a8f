"""TextBefore: what the context has read before each of a batch of blocks, and what it reads on from there."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .tokcom_context_encoder import ContextEncoder


@dataclass
class TextBefore:
    """The text before blocks, as a `ContextEncoder` has read it.

    state: the context's state before each block, (blocks, hidden); zeros where the text is hidden from a block.
    states: all states of the rows, (rows, 1 + length, hidden); None where the rows were not read at once.
    encoder, cache: the context, and its keys and values of the rows; None where it does not read on.
    seen: the cached tokens of its row that a block may see, (rows, blocks of a row, cached) bool; None: each row has one
        block, which sees all of them.
    shown: 1 for blocks that see their text and 0 for others, (blocks, 1, 1); None: all do.
    """

    state: torch.Tensor
    states: torch.Tensor | None = None
    encoder: ContextEncoder | None = None
    cache: Cache | None = None
    seen: torch.Tensor | None = None
    shown: torch.Tensor | None = None

    @classmethod
    def of_rows(
        cls, model: Any, input_ids: torch.Tensor, starts: torch.Tensor, context_mask: torch.Tensor | None = None
    ) -> "TextBefore":
        """Reads whole rows.

        Args:
            model: `TokComModel` with a context.
            input_ids: (rows, length).
            starts: index of the first token of each block of a row, of any shape.
            context_mask: (rows, blocks), False hides the text from a block.
        """
        encoder, starts = model.context, starts.flatten()
        cache = DynamicCache(config=model.config.context) if model.config.reads_guess else None
        states = encoder(input_ids, cache=cache)
        state, shown, seen = states[:, starts], None, None
        if context_mask is not None:
            state = state * context_mask.to(state).unsqueeze(-1)
            shown = context_mask.flatten()[:, None, None]
        if cache is not None:
            if cache.get_seq_length() == 0:
                # Gradient checkpointing computes the layers again in the backward pass, and fills no cache.
                with torch.no_grad(), encoder.with_cache():
                    encoder(input_ids, cache=cache)
            # The start token stands before the first token of a row.
            seen = torch.arange(states.shape[1], device=states.device) <= starts.to(states.device)[:, None]
            seen = seen.expand(len(input_ids), -1, -1)
        return cls(state.flatten(0, 1), states, encoder, cache, seen, shown)

    def read_on(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The context's states after each of `embeddings` (blocks, tokens, hidden), read as the text of their block."""
        assert self.encoder is not None and self.cache is not None
        states = self.encoder.read_on(embeddings, self.cache, self.seen)
        return states if self.shown is None else states * self.shown.to(states)
