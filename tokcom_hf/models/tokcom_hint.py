"""Hint: a second loss of `TokComVAE`, for latents that the preceding text helps to denoise.

    x_t = t · z + (1 − t) · noise                                          a noisy latent
    ẑ = t · x_t / (t² + (1 − t)²) + hint(tokens before the chunk)          is decoded; the loss is its cross-entropy

The first term is the best linear estimate of z for latents of unit scale. If z has a Gaussian prior whose mean depends on
the preceding tokens, the estimate gains a term that does not depend on x_t; the hint learns this term. A flow easily learns
latents for which such a term helps.
"""

import torch
from torch import nn

from .configuration_tokcom_vae import TokComVAEConfig

# Weight of the loss. Times t are σ(N(TIME_MEAN, 1)), most of them noisy enough that the hint matters.
HINT_WEIGHT = 0.3
TIME_MEAN = -0.7


class Hint(nn.Sequential):
    """Embeddings of the `hint_tokens` tokens before a chunk, (chunks, hint_tokens · hidden) → (chunks, latent)."""

    def __init__(self, config: TokComVAEConfig):
        width, size = config.hint_tokens * config.hidden_size, 2 * config.hidden_size
        norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        super().__init__(norm, nn.Linear(width, size), nn.SiLU(), nn.Linear(size, config.latent_size))
        self.chunk_size, self.tokens = config.chunk_size, config.hint_tokens

    def noisy_latents(self, input_ids: torch.Tensor, latents: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """Shifted noisy latents of all chunks that have `hint_tokens` tokens before them, (chunks, latent), row after row.

        Args:
            input_ids: (rows, length).
            latents: latents z of all chunks, (rows · length / chunk_size, latent).
            embedding: maps ids (…) to embeddings (…, hidden).

        Raises:
            ValueError: the rows have no more than `hint_tokens` tokens.
        """
        if input_ids.shape[1] <= self.tokens:
            raise ValueError(
                f"hint_tokens={self.tokens} needs longer rows of text to train on, got {input_ids.shape[1]} tokens."
            )
        before = input_ids.unfold(1, self.tokens, self.chunk_size)[:, :-1].reshape(-1, self.tokens)
        z = latents.view(len(input_ids), -1, latents.shape[-1])[:, self.tokens // self.chunk_size :].flatten(0, 1)
        t = torch.sigmoid(TIME_MEAN + torch.randn(len(z), 1, device=z.device)).to(z.dtype)
        x_t = t * z + (1 - t) * torch.randn_like(z)
        return t * x_t / (t**2 + (1 - t) ** 2) + self(embedding(before).flatten(1))
