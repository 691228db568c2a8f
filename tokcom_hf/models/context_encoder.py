"""ContextEncoder: a causal transformer that reads finished chunks once, so that few layers are left for the flow.

In block diffusion (arXiv 2503.09573) noisy and clean chunks pass through the same layers, all of them at every flow step.
Here deep layers see clean chunks only, as the encoder of arXiv 2510.22852; the denoiser's layers read its states, and a
chunk behind a finished one starts from that one's state, as the next vector of CALM does (arXiv 2510.27688).
"""

from dataclasses import dataclass

import torch
from torch import nn

from .layers import Block, KeyValue, rotary_embeddings


def joined(before: list[KeyValue], after: list[KeyValue]) -> list[KeyValue]:
    """Keys and values per layer of `before`'s positions, then of `after`'s."""
    return [(torch.cat([k, nk], dim=2), torch.cat([v, nv], dim=2)) for (k, v), (nk, nv) in zip(before, after)]


@dataclass
class FinishedChunks:
    """What later chunks need of finished ones.

    layers: keys and values of each denoiser layer; encoder: of each `ContextEncoder` layer; state: of the last chunk,
    (batch, 1, hidden), None without an encoder; tokens: keys and values of a `TokenAttention`, None without one; latent: the
    last chunk's, (batch, 1, latent), where there are tokens.
    """

    layers: list[KeyValue]
    encoder: list[KeyValue]
    state: torch.Tensor | None = None
    tokens: KeyValue | None = None
    latent: torch.Tensor | None = None

    def extended(self, new: "FinishedChunks") -> "FinishedChunks":
        """These chunks and the `new` ones behind them."""
        return FinishedChunks(joined(self.layers, new.layers), joined(self.encoder, new.encoder), new.state)

    def repeated(self, count: int) -> "FinishedChunks":
        """Each row `count` times, copies side by side."""

        def each(value):
            if value is None:
                return None
            if torch.is_tensor(value):
                return value.repeat_interleave(count, 0)
            return type(value)(each(part) for part in value)

        return FinishedChunks(**{name: each(value) for name, value in vars(self).items()})


class ContextEncoder(nn.Module):
    """Clean latents → a state per chunk that knows all chunks up to it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(config.latent_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_context_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        latents: torch.Tensor,
        position_offset: int = 0,
        attention_mask: torch.Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """
        Args:
            latents: clean, (batch, chunks, latent).
            position_offset: position of the first of them, as many chunks as `past` holds.
            attention_mask: (batch, past + chunks), 1 = real, 0 = padding.
            past: keys and values of the chunks before, as returned.

        Returns:
            states (batch, chunks, hidden), and keys and values of these chunks per layer.
        """
        config, chunks, device = self.config, latents.shape[1], latents.device
        query = torch.arange(position_offset, position_offset + chunks, device=device)
        mask = None
        if chunks > 1 or attention_mask is not None:
            key = torch.arange(position_offset + chunks, device=device)
            mask = (key[None, :] <= query[:, None])[None, None]
            if attention_mask is not None:
                # A padded query must see something, or its softmax is empty.
                own = (key[None, :] == query[:, None])[None, None]
                mask = mask & attention_mask.bool()[:, None, None, :] | own
        head_dim = config.hidden_size // config.num_attention_heads
        hidden_states = self.input_proj(latents.to(self.input_proj.weight.dtype))
        rotary = rotary_embeddings(query[None], head_dim, config.rope_theta, hidden_states.dtype)
        key_values = []
        for index, layer in enumerate(self.layers):
            prefix = None if past is None else past[index]
            hidden_states, key_value, _ = layer(hidden_states, rotary, mask, prefix)
            key_values.append(key_value)
        return self.norm(hidden_states), key_values
