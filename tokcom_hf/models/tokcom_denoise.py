"""denoise: the clean latents that a `TokComModel` predicts from noisy ones, with the text before them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .tokcom_text_before import TextBefore


@dataclass
class Denoised:
    """A prediction of the clean latents.

    clean_latents: x̂1 in the flow's space, (blocks, chunks, latent).
    states: of the tokens, (blocks, tokens, state), from which a `TokenPosterior` made it; None without one.
    scores: their products with its table, (chunks of all blocks, places, vocab); None with gradients or if they are many.
    cross_entropy: of the tokens' posterior, nats per token; None without labels or without a `TokenPosterior`.
    """

    clean_latents: torch.Tensor
    states: torch.Tensor | None = None
    scores: torch.Tensor | None = None
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


class Predictions:
    """(x_t, t) → predicted clean latents along one flow, with what they need of the predictions before.

    predict: (x_t, t, earlier) → `Denoised`, where `earlier` is the prediction before with self-conditioning, else None.
    """

    def __init__(self, model: Any, predict: Callable[[torch.Tensor, float, torch.Tensor | None], Denoised]):
        self.model, self.predict = model, predict
        self.earlier: torch.Tensor | None = None
        # Of the last two calls, the scores or else the states of the tokens, and the times.
        self.calls: list[tuple[torch.Tensor, float]] = []
        self.scored = False

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        found = self.predict(x, t, self.earlier)
        if self.model.config.denoiser.self_conditioning:
            self.earlier = found.clean_latents
        kept = found.states if found.scores is None else found.scores
        if kept is not None:
            self.scored, self.calls = found.scores is not None, [*self.calls[-1:], (kept, t)]
        return found.clean_latents

    def between(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The same without a call: the evidence of x_t meets states that go on from those of the last two calls.

        The states are extrapolated linearly in log(t / (1 − t)). They change slowly; the evidence is fast and cheap.
        """
        states, now = self.calls[-1]
        if len(self.calls) == 2 and self.calls[0][1] > 0:
            before, then = self.calls[0]
            then, now, t_ = (math.log(time / (1 - time)) for time in (then, now, t))
            states = states + (states - before) * ((t_ - now) / (now - then))
        time = torch.full((1,), t, device=x.device)
        return self.model.posterior.latents_of(self.model, x, time, states, self.scored)
