"""denoise: the clean latents that a `TokComModel` predicts from noisy ones, with the text before them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .tokcom_text_before import TextBefore


@dataclass
class Denoised:
    """A prediction of the clean latents.

    clean_latents: x̂1 in the flow's space, (blocks, chunks, latent).
    cross_entropy: of the tokens' posterior, nats per token; None without labels or without a `TokenPosterior`.
    """

    clean_latents: torch.Tensor
    cross_entropy: torch.Tensor | None = None


@dataclass
class Tokens:
    """Tokens of blocks, (blocks, chunks, chunk_size), -100 for none.

    asked: those whose cross-entropy is wanted; None wants none.
    told: those that a `TokenPosterior` reads instead of its first guess.
    """

    asked: torch.Tensor | None = None
    told: torch.Tensor | None = None


def denoise(
    model: Any,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    before: TextBefore | None = None,
    self_condition: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    denoiser: nn.Module | None = None,
    tokens: Tokens | None = None,
) -> Denoised:
    """Predicts the clean latents with the denoiser of a `TokComModel` and, if it has one, its `TokenPosterior`.

    Args:
        x_t, timesteps, self_condition, attention_mask: as in `DenoisedModel.forward`.
        before: the text before each block; None predicts without it.
        denoiser: takes the place of `model.denoiser`.
        tokens: what a `TokenPosterior` is told, and what its cross-entropy is asked for.
    """
    denoiser = model.denoiser if denoiser is None else denoiser
    if model.posterior is not None:
        return model.posterior.predict(model, denoiser, x_t, timesteps, before, attention_mask, tokens or Tokens())
    context = None if before is None else before.state
    output = denoiser(
        x_t, timesteps, context=context, self_condition=self_condition, attention_mask=attention_mask, return_dict=True
    )
    return Denoised(output.clean_latents)
