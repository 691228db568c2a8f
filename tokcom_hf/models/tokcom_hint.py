"""Hint: a second loss of `TokComVAE` that lets the tokens before a chunk move its latent along straight lines.

A noisy latent x_t = t · z + (1 − t) · noise is decoded after a hint, computed from the tokens before its chunk, was added.
For latents of unit scale the best linear estimate of z is t · x_t / (t² + (1 − t)²); what a Gaussian prior knows of z adds a
term that does not depend on x_t, which is the hint. A flow follows latents easily for which such a term helps.
"""

import torch
from torch import nn

from .configuration_tokcom_vae import TokComVAEConfig

# Weight of the loss. Times are σ(N(TIME_MEAN, 1)), most of them where a hint decides.
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
            latents: of all chunks, (rows · length / chunk_size, latent).
            embedding: ids → (…, hidden).

        Raises:
            ValueError: rows of no more than `hint_tokens` tokens.
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
