"""Denoising metrics of TokCom: token accuracy of denoised latents against the flow time t, given the preceding text."""

from dataclasses import replace
from typing import Any

import torch

from ..models.tokcom_context_encoder import read_before
from ..models.tokcom_denoise import Denoised, denoise
from .tokcom_reconstruction import token_and_chunk_accuracy


class BlockDenoiser:
    """Predicts the clean latents of all chunks of given rows of text in one call of the denoiser.

    With a context, each block of `config.block_size` chunks (of one chunk if `block_size` does not divide the row) is
    conditioned on the true tokens before it. Without a context, the whole row is a single block.

    Args:
        model: `TokComModel`.
        input_ids: (rows, length), `length` a multiple of the chunk size.
        attention_mask: (rows, length), 0 for padding; None means no padding.
    """

    @torch.no_grad()
    def __init__(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        chunk = model.config.vae.chunk_size
        rows, chunks = len(input_ids), input_ids.shape[1] // chunk
        size = model.config.block_size or chunks
        self.model, self.size = model, size if chunks % size == 0 else 1
        self.before = self.mask = None
        if model.context is not None:
            starts = torch.arange(0, chunks * chunk, self.size * chunk)
            _, self.before = read_before(model, input_ids, starts)
        if attention_mask is not None and not bool(attention_mask.all()) and self.size > 1:
            real = attention_mask.view(rows, -1, self.size, chunk).any(dim=-1).flatten(0, 1)
            # A block of padding only attends to itself, because a row of attention must not be empty.
            self.mask = (real | ~real.any(dim=-1, keepdim=True)).long()

    @torch.no_grad()
    def __call__(self, x_t: torch.Tensor, t: float, earlier: Denoised | None = None) -> torch.Tensor:
        """Predicts clean latents from noisy latents `x_t` (rows, chunks, latent_size) at time t in [0, 1]; same shape."""
        return self.predict(x_t, t, earlier).clean_latents

    @torch.no_grad()
    def predict(self, x_t: torch.Tensor, t: float, earlier: Denoised | None = None) -> Denoised:
        """As the call, with all that `denoise` finds."""
        as_blocks, time = (-1, self.size, x_t.shape[-1]), torch.full((1,), t, device=x_t.device)
        if earlier is not None:
            earlier = replace(earlier, clean_latents=earlier.clean_latents.reshape(as_blocks))
        found = denoise(self.model, x_t.reshape(as_blocks), time, self.before, earlier, self.mask)
        return replace(found, clean_latents=found.clean_latents.reshape(x_t.shape))


@torch.no_grad()
def denoising_metrics(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    times: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9),
    seed: int = 0,
) -> dict[str, float]:
    """Measures token accuracy after one denoiser prediction from x_t, and after decoding x_t directly, for each t.

    Args:
        model: `TokComModel`.
        input_ids, attention_mask: (rows, length) held-out text, 0 for padding.
        times: flow times t (0 noise, 1 clean).
        seed: seed of the noise.

    Returns:
        `denoised_accuracy_t_0.1`, `direct_accuracy_t_0.1`, and so on.
    """
    model.eval()
    device = next(model.parameters()).device
    ids, mask = input_ids.to(device), attention_mask.to(device)
    denoise = BlockDenoiser(model, ids, mask)
    clean = model.standardize(model.encode(ids))
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(clean.shape, generator=generator) * model.config.noise_std).to(clean)
    metrics = {}
    for t in times:
        x_t = (1 - t) * noise + t * clean
        for name, latents in (("denoised", denoise(x_t, t)), ("direct", x_t)):
            decoded = model.decode(model.unstandardize(latents))
            accuracy = token_and_chunk_accuracy(decoded, ids, mask, model.config.vae.chunk_size)["token_accuracy"]
            metrics[f"{name}_accuracy_t_{t:g}"] = accuracy
    return metrics


@torch.no_grad()
def denoise_reconstruct_accuracy(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    num_steps: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """Measures token accuracy after the whole flow from t = noise_level (0 noise, 1 clean).

    Returns:
        `reconstructed_accuracy_t_0.5`, and so on.
    """
    result = {}
    for level in noise_levels:
        generator = torch.Generator().manual_seed(seed)
        ids = model.denoise_reconstruct(input_ids.to(model.device), level, num_steps, generator=generator).cpu()
        accuracies = token_and_chunk_accuracy(ids, input_ids, attention_mask, model.config.vae.chunk_size)
        result[f"reconstructed_accuracy_t_{level:g}"] = accuracies["token_accuracy"]
    return result
