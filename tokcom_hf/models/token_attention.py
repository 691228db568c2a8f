"""TokenAttention: tokens look at single tokens of the finished chunks.

A chunk's state tells what several tokens say together; that "Mar" followed "Mor" above, whatever their places in their
chunks, is hard to read from it. Here a key is made of a token and those just left of it, by one map for every place, so that
a query made of the last tokens finds what followed them before: the second half of an induction head (arXiv 2209.11895),
whose first half is the window of the keys. One layer, since deep ones over tokens are what chunks save.
"""

import torch
from torch import nn

from .layers import KeyValue, attend, rotary_embeddings, rotated
from .token_window import chunk_before

# Of positions of tokens; the denoiser's `rope_theta` is about those of chunks.
ROPE_THETA = 10_000.0


class TokenAttention(nn.Module):
    """Attention of each token's hidden state over all tokens of the finished chunks, to be added to it.

    Keys and values come from clean latents alone: the token's and those of the `chunk_size` − 1 tokens left of it. One more
    key with the value zero is always there, so that a token may look at nothing.
    """

    def __init__(self, config, chunk_size: int, hidden_size: int, num_heads: int):
        """config: the denoiser's; hidden_size: the width of the hidden states, a multiple of 2 · num_heads."""
        super().__init__()
        self.config = config
        self.chunk_size = chunk_size
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.norm = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(config.latent_size, hidden_size)
        self.v_proj = nn.Linear(config.latent_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        # With the usual small initial weights every key looks the same for long.
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.fan_in_init = True

    def key_value(
        self,
        latents: torch.Tensor,
        position_offset: int = 0,
        previous: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> KeyValue:
        """Keys and values of the tokens of clean latents (batch, chunks, latent), as (batch, heads, tokens, head_dim).

        Those of the first chunks (position_offset 0) come behind the one that says nothing.

        position_offset: chunks before them; previous: clean latent of the last of those, (batch, 1, latent); attention_mask:
        (batch, position_offset + chunks), 1 = real, 0 = padding.
        """
        own = latents.unflatten(-1, (self.chunk_size, -1))
        last = None if previous is None else previous.unflatten(-1, (self.chunk_size, -1))
        before = chunk_before(own, last, attention_mask=attention_mask)
        windows = torch.cat([before, own], dim=2).unfold(2, self.chunk_size, 1)[:, :, 1:].flatten(1, 2).flatten(2)
        windows = windows.to(self.k_proj.weight.dtype)
        key, value = (self._heads(projection(windows)) for projection in (self.k_proj, self.v_proj))
        start = position_offset * self.chunk_size
        positions = torch.arange(start, start + key.shape[2], device=key.device)
        key = rotated(key, self._rotary(positions[None], key.dtype))
        if position_offset == 0:
            key, value = (nn.functional.pad(part, (0, 0, 1, 0)) for part in (key, value))
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value: KeyValue,
        token_mask: torch.Tensor,
        position_offset: int = 0,
        block_index: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (tokens, hidden) of the tokens in `token_mask`.
            key_value: of all finished chunks. Several noisy copies of a row, one after the other, share the row's keys.
            token_mask: (copies · batch, chunks, chunk_size), the tokens that look.
            position_offset: chunks before the first of these.
            block_index: (chunks,) block number of each chunk where the keys are those of the same chunks, finished: a token
                sees the blocks before its own. None: it sees all keys.
            attention_mask: (copies · batch, position_offset + chunks), 1 = real, 0 = padding.

        Returns:
            what the tokens read, (tokens, hidden).
        """
        key, value = key_value
        rows, length = len(key), key.shape[2] - 1
        copies = len(token_mask) // rows
        which, chunk, place = token_mask.nonzero(as_tuple=True)
        query = self.q_proj(self.norm(hidden_states))
        # Rows have different numbers of tokens that look; those of all copies of a row stand side by side, then filling.
        counts = token_mask.reshape(rows, -1).sum(-1)
        row, slot, longest = which // copies, None, int(counts.max())
        if len(row) != rows * longest:
            slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]

        def padded(values: torch.Tensor) -> torch.Tensor:
            if slot is None:
                return values.view(rows, longest, *values.shape[1:])
            return values.new_zeros(rows, longest, *values.shape[1:]).index_put((row, slot), values)

        positions = padded((chunk + position_offset) * self.chunk_size + place)
        query = rotated(self._heads(padded(query)), self._rotary(positions, query.dtype))
        visible = None
        if block_index is not None:
            first = torch.searchsorted(block_index, block_index) * self.chunk_size
            visible = torch.arange(length, device=key.device) < padded(first[chunk])[..., None]
        if attention_mask is not None:
            real = attention_mask[::copies, : length // self.chunk_size].bool().repeat_interleave(self.chunk_size, 1)
            visible = real[:, None, :] if visible is None else visible & real[:, None, :]
        if visible is not None:
            visible = nn.functional.pad(visible, (1, 0), value=True)[:, None]
        read = attend(self, query, key, value, visible)[0].flatten(2)
        return self.o_proj(read.flatten(0, 1) if slot is None else read[row, slot])

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) → (batch, heads, length, head_dim)."""
        return values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> KeyValue:
        return rotary_embeddings(positions, self.head_dim, ROPE_THETA, dtype)
