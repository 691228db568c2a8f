"""TokenWindow: what a token's neighbours tell of it, read by one map for every place of a chunk.

The denoiser sees chunks; each place of a chunk has weights of its own there, so that what follows what has to be learned
once per place, through attention where the neighbour is in another chunk. This map is shared by all places, as the local
model of MegaByte is (arXiv 2305.07185), and learns it from every token.
"""

import torch
from torch import nn


class TokenWindow(nn.Module):
    """A two-layer map over each token's window, to be added to the denoiser's `token_hidden`.

    The window of a token: itself and as many tokens left of it as a chunk has; of each its noisy latent, the earlier
    prediction of it where the model is self-conditioned, and its time. Zeros stand for what is not there.
    """

    def __init__(self, chunk_size: int, token_size: int, self_conditioning: bool, width: int, hidden_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.self_conditioning = self_conditioning
        self.up = nn.Linear((chunk_size + 1) * (token_size * (1 + self_conditioning) + 1), width)
        # With the usual small initial weights, what stands left of a token would go unseen for long.
        self.up.fan_in_init = True
        self.down = nn.Linear(width, hidden_size)

    def forward(
        self, latents: torch.Tensor, times: torch.Tensor, previous: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None, context: torch.Tensor | None = None,
        block_index: torch.LongTensor | None = None, attention_mask: torch.LongTensor | None = None,
        token_mask: torch.Tensor | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """
        Args:
            latents: what the denoiser saw, (batch, chunks, latent).
            times: (batch, 1 or chunks, 1 or chunk_size).
            previous: clean latent left of the first chunk, (batch, 1, latent); None: nothing.
            token_mask: (batch, chunks, chunk_size), the tokens to look at; None: all.
            self_condition, context, block_index, attention_mask: as in the denoiser; other arguments of it are ignored.

        Returns:
            (batch, chunks, chunk_size, hidden), or (tokens, hidden) of the tokens in `token_mask`.
        """
        own = self._tokens(latents, times, self_condition)
        before = chunk_before(own, self._finished(previous), self._finished(context), block_index, attention_mask)
        windows = torch.cat([before, own], dim=2).unfold(2, self.chunk_size + 1, 1)
        windows = (windows if token_mask is None else windows[token_mask]).flatten(-2)
        return self.down(nn.functional.silu(self.up(windows.to(self.up.weight.dtype))))

    def _tokens(self, latents: torch.Tensor, times: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Latent, earlier prediction and time of each token, (batch, chunks, chunk_size, features)."""
        parts = [latents]
        if self.self_conditioning:
            parts.append(torch.zeros_like(latents) if condition is None else condition.to(latents))
        tokens = [part.unflatten(-1, (self.chunk_size, -1)) for part in parts]
        times = times.to(latents).expand(*latents.shape[:2], self.chunk_size)
        return torch.cat([*tokens, times.unsqueeze(-1)], dim=-1)

    def _finished(self, latents: torch.Tensor | None) -> torch.Tensor | None:
        """Of clean latents there is no prediction, as in the denoiser, and their time is 1."""
        return None if latents is None else self._tokens(latents, torch.ones_like(latents[..., :1]), None)


def chunk_before(
    chunks: torch.Tensor,
    previous: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
    block_index: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
) -> torch.Tensor:
    """What stands left of each chunk, same shape as `chunks` (batch, chunks, tokens, features).

    previous: what stands before the first chunk (batch, 1, tokens, features); None: nothing, zeros.
    context, block_index: as in the denoiser; the first chunk of a block follows a finished one, which is `context`.
    attention_mask: (batch, prefix + chunks), 1 = real; zeros stand for padding.
    """

    def shift(values: torch.Tensor) -> torch.Tensor:
        start = torch.zeros_like(values[:, :1]) if previous is None else previous.to(values)
        return torch.cat([start, values[:, :-1]], dim=1)

    before = shift(chunks)
    if context is not None and block_index is not None:
        first = torch.ones_like(block_index, dtype=torch.bool)
        first[1:] = block_index[1:] != block_index[:-1]
        before = torch.where(first[:, None, None], shift(context), before)
    if attention_mask is not None:
        real = nn.functional.pad(attention_mask, (1, 0))[:, -chunks.shape[1] - 1 : -1]
        before = before * real[..., None, None].to(before)
    return before
