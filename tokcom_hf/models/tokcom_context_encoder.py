"""ContextEncoder: a causal transformer over the tokens of all finished chunks.

Its state after a token is the condition of a block that begins there. In training, heads predict the next tokens from each
state (arXiv 2404.19737), because their loss is a less noisy signal than that of the flow. In generation, a `TokenPosterior`
starts from what the heads predict; without one, the heads are not used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaModel

from .shared_cache_name import CACHE
from .shared_cross_entropy import chunked_cross_entropy
from .shared_wrapped_base import computed_buffers_kept


class ContextEncoder(nn.Module):
    """A causal Llama, and one linear head per token of the next chunk.

    Args:
        config: shape of the Llama; its `vocab_size` counts the start token, too.
        chunk_size: tokens per chunk, which is the number of heads.
        start_token_id: id that precedes the first token of every text.
    """

    def __init__(self, config: LlamaConfig, chunk_size: int, start_token_id: int):
        super().__init__()
        self.chunk_size, self.start_token_id = chunk_size, start_token_id
        self.model = LlamaModel(config)
        self.heads = nn.Linear(config.hidden_size, chunk_size * config.hidden_size, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """States of the context.

        Args:
            input_ids: tokens after those in `cache`, (batch, length); length may be 0 at the beginning of a text.
            attention_mask: of all tokens so far, (batch, cached + length), 1 = token, 0 = padding.
            cache: keys and values of all earlier tokens, to which those of `input_ids` are added. None or empty at the
                beginning of a text.

        Returns:
            The state after each token, (batch, length, hidden). At the beginning of a text the state before its first token
            comes first: (batch, 1 + length, hidden).
        """
        positions = None
        if cache is None or cache.get_seq_length() == 0:
            start = input_ids.new_full((len(input_ids), 1), self.start_token_id)
            input_ids = torch.cat([start, input_ids], dim=1)
        if attention_mask is not None:
            # All tokens see the start token, and padding has no position.
            attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)
            positions = (attention_mask.cumsum(dim=1) - 1)[:, -input_ids.shape[1] :]
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=cache is not None,
            return_dict=True, **{CACHE: cache},
        ).last_hidden_state  # fmt: skip

    def read_on(
        self, soft: torch.Tensor, cache: Cache | None, seen: torch.Tensor, text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Reads soft tokens of blocks behind the text in `cache`, and leaves the cache as it was.

        Args:
            soft: expected rows of the table, (rows · blocks, tokens, hidden). A block's tokens see the text before it and
                each other from left to right.
            cache: keys and values of the rows.
            seen: which cached tokens precede each block, (rows or 1, blocks, cached) bool.
            text: where there is no cache, the tokens themselves, (rows, cached), which are read again.

        Returns:
            The states of the tokens behind each soft token, (rows · blocks, tokens, hidden), as of the first head.
        """
        blocks, tokens = seen.shape[1], soft.shape[1]
        rows, places = len(soft) // blocks, torch.arange(blocks * tokens, device=soft.device)
        own = (places[:, None] // tokens == places // tokens) & (places[:, None] >= places)
        seen = seen.expand(rows, -1, -1)
        mask = torch.cat([seen.repeat_interleave(tokens, 1), own.expand(rows, -1, -1)], dim=2).unsqueeze(1)
        positions = seen.sum(dim=2).repeat_interleave(tokens, 1) + places % tokens
        soft_tokens = soft.reshape(rows, blocks * tokens, -1)
        if text is not None:
            again = torch.arange(text.shape[1], device=soft.device).expand(rows, -1)
            causal = nn.functional.pad(again[:, :, None] >= again[:, None], (0, blocks * tokens)).unsqueeze(1)
            mask, positions = torch.cat([causal, mask], dim=2), torch.cat([again, positions], dim=1)
            soft_tokens = torch.cat([self.model.embed_tokens(text).to(soft.dtype), soft_tokens], dim=1)
        # Additive, as every implementation of attention takes it.
        mask = torch.zeros(mask.shape, device=soft.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        states = self.model(
            inputs_embeds=soft_tokens, attention_mask=mask.to(soft.dtype), position_ids=positions,
            use_cache=cache is not None, return_dict=True, **{CACHE: cache},
        ).last_hidden_state  # fmt: skip
        if cache is not None:
            cache.crop(-blocks * tokens)
        return self._some_heads(states[:, -blocks * tokens :], 0, 1).reshape(soft.shape)

    def head_states(self, states: torch.Tensor) -> torch.Tensor:
        """states (…, hidden) → (…, chunk_size, hidden), whose products with the `table` are logits of the next tokens."""
        return self.heads(states).unflatten(-1, (self.chunk_size, -1))

    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        """states (…, hidden) → logits (…, chunk_size, vocab) of the next tokens, the start token's lowest."""
        hidden = self.head_states(states)
        logits = nn.functional.linear(hidden, self.table(hidden.device))
        start = torch.tensor([self.start_token_id], device=logits.device)
        return logits.index_fill(-1, start, torch.finfo(logits.dtype).min)

    def cross_entropy(self, states: torch.Tensor, labels: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Mean cross-entropy, in nats per token, of the heads first … last − 1.

        Args:
            states: (rows, hidden).
            labels: the token that each head is to predict, (rows, last − first); -100 does not count.
        """
        hidden = self._some_heads(states, first, last)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.table(hidden.device), labels.flatten())

    def _some_heads(self, states: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """`head_states` of the heads first … last − 1, (…, last − first, hidden), without computing the others."""
        if not is_plain(self.heads, nn.Linear):
            return self.head_states(states)[..., first:last, :]
        weight = self.heads.weight.unflatten(0, (self.chunk_size, -1))[first:last].flatten(0, 1)
        return nn.functional.linear(states, weight).unflatten(-1, (last - first, -1))

    def table(self, device: torch.device) -> torch.Tensor:
        """The embedding, (vocab, hidden), which the heads share as output table."""
        return embedding_table(self.model.embed_tokens, self.model.config.vocab_size, device)

    def _apply(self, *args, **kwargs):
        with computed_buffers_kept(self.model):
            return super()._apply(*args, **kwargs)

    def resize(self, rows: int, start_token_id: int, mean_resizing: bool) -> None:
        """Resizes the embedding to the VAE's, and moves the start token's row to where the VAE's omni token now is."""
        start = self.model.embed_tokens.weight[self.start_token_id].detach().clone()
        embedding = self.model.resize_token_embeddings(rows, None, mean_resizing)
        with torch.no_grad():
            embedding.weight[start_token_id] = start
        self.start_token_id = start_token_id


class TextBefore(NamedTuple):
    """The text before blocks.

    state: the context's state before each block, (blocks, hidden); zeros hide the text.
    read_on: `ContextEncoder.read_on` behind this text, (blocks, tokens, hidden) → (blocks, tokens, hidden); None in models
        without `read_guesses`.
    """

    state: torch.Tensor
    read_on: Callable[[torch.Tensor], torch.Tensor] | None = None


def read_before(
    model: Any, input_ids: torch.Tensor, starts: torch.Tensor, shown: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, TextBefore | None]:
    """Reads whole rows with the context of a `TokComModel`; (None, None) without one.

    Args:
        input_ids: (rows, length).
        starts: index of the first token of each block of a row, of any shape.
        shown: (rows, blocks), False hides the text from a block.

    Returns:
        The context's states, (rows, 1 + length, hidden), and the text before the blocks of all rows.
    """
    context = model.context
    if context is None:
        return None, None
    if not model.config.read_guesses:
        states = context(input_ids)
        return states, TextBefore(states_before(states, starts, shown))
    cache: Cache | None = DynamicCache(config=context.model.config)
    text = None
    if context.training and context.model.gradient_checkpointing:
        # Which keeps no keys and values.
        cache, text = None, nn.functional.pad(input_ids, (1, 0), value=context.start_token_id)
    states = context(input_ids, cache=cache)
    seen = torch.arange(states.shape[1], device=states.device) <= starts.to(states.device).view(1, -1, 1)

    def read_on(soft: torch.Tensor) -> torch.Tensor:
        found = context.read_on(soft, cache, seen, text)
        return found if shown is None else found * shown.to(found).view(-1, 1, 1)

    return states, TextBefore(states_before(states, starts, shown), read_on)


def states_before(
    states: torch.Tensor, starts: torch.Tensor, context_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The context's state before each block, (rows · blocks, hidden).

    Args:
        states: of a `ContextEncoder` for whole rows, (rows, 1 + length, hidden).
        starts: index of the first token of each block of a row, of any shape.
        context_mask: (rows, blocks), False hides the text from a block, whose state is then zero.
    """
    before = states[:, starts.flatten()]
    return (before if context_mask is None else before * context_mask.to(before).unsqueeze(-1)).flatten(0, 1)


def embedding_table(embedding: Any, rows: int, device: torch.device) -> torch.Tensor:
    """The rows of an embedding, (vocab, hidden), also where an adapter adds to them or they are offloaded."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight
    return embedding(torch.arange(rows, device=device))


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether `module.weight` can stand for the module: no adapter adds to it, and it is not offloaded between forwards."""
    return type(module) is kind and not hasattr(module, "_hf_hook")
