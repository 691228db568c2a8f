"""denoise: the clean latents that a `TokComModel` predicts from noisy ones, with the text before them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .tokcom_context_encoder import TextBefore


@dataclass
class Denoised:
    """A prediction of the clean latents.

    clean_latents: x̂1 in the flow's space, (blocks, chunks, latent).
    states: of the tokens, (blocks, tokens, state), from which a `TokenPosterior` made it; None without one.
    scores: their products with its table, (chunks of all blocks, places, vocab); None with gradients or if they are many.
    correction: what `RecentTokens` adds to the scores, of their shape. Without scores it is narrow, (blocks, tokens, width),
        and its map by `RecentTokens.up` is added to the states. None if nothing is added.
    cross_entropy: of the tokens' posterior, nats per token; None without labels or without a `TokenPosterior`.
    text_known: blocks whose first token the context alone decides, (blocks,) bool; None if there are none.
    """

    clean_latents: torch.Tensor
    states: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    text_known: torch.Tensor | None = None


class PathPoint(NamedTuple):
    """Noisy latents x_t, (blocks, chunks, latent), at times t, (blocks,) or (blocks, chunks)."""

    x_t: torch.Tensor
    timesteps: torch.Tensor


def denoise(
    model: Any,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor | TextBefore | None = None,
    earlier: Denoised | PathPoint | None = None,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    learns: bool = False,
) -> Denoised:
    """Predicts the clean latents with the denoiser of a `TokComModel` and, if it has one, its `TokenPosterior`.

    Args:
        x_t, timesteps: as in `DenoisedModel.forward`.
        context: the text before each block, or the context's state alone, (blocks, hidden); None predicts without it.
            Models with `read_guesses` need the text.
        earlier: the prediction before along the same flow, for models with `self_conditioning` or a `TokenPosterior`; or an
            earlier point of the path, where the denoiser of a model with a `TokenPosterior` is called for this prediction.
        attention_mask: as in `DenoisedModel.forward`. A `TokenPosterior`, which reads from left to right, needs none for
            padding on the right.
        labels: tokens of the blocks, (blocks, chunks, chunk_size), -100 for none, whose cross-entropy a `TokenPosterior`
            computes.
        learns: with `read_guesses`, denoiser and recent tokens add to every token, as they are trained, and not only as far
            as a guess before it may be wrong. Models without it always do.

    Raises:
        ValueError: a model with `read_guesses` got a state alone.
    """
    text = TextBefore(context) if isinstance(context, torch.Tensor) else context
    if model.config.read_guesses and text is not None and text.read_on is None:
        raise ValueError(
            "A model with read_guesses reads on behind the text: pass a `TextBefore` with `read_on`, which "
            "`read_before` gives."
        )
    if model.posterior is not None:
        return model.posterior.predict(model, x_t, timesteps, text, earlier, labels, learns)
    conditioned = model.config.denoiser.self_conditioning and isinstance(earlier, Denoised)
    before, state = earlier.clean_latents if conditioned else None, None if text is None else text.state
    output = model.denoiser(
        x_t, timesteps, context=state, self_condition=before, attention_mask=attention_mask, return_dict=True
    )
    return Denoised(output.clean_latents)


def with_parts(model: Any, **parts: nn.Module | None) -> Any:
    """A `TokComModel` that shares everything with `model` but these parts."""
    other = copy.copy(model)
    other._modules = model._modules | parts
    return other


class Predictions:
    """(x_t, t) → predicted clean latents along one flow, with what they need of the predictions before.

    predict: (x_t, t, the prediction before or None) → `Denoised`.
    """

    def __init__(self, model: Any, predict: Callable[[torch.Tensor, float, Denoised | None], Denoised]):
        self.model, self.predict = model, predict
        # The last two predictions that called the denoiser, and their times.
        self.calls: list[tuple[Denoised, float]] = []
        # That of the last prediction of all.
        self.correction: torch.Tensor | None = None

    @property
    def earlier(self) -> Denoised | None:
        """The last prediction that called the denoiser."""
        return self.calls[-1][0] if self.calls else None

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        found = self.predict(x, t, self.earlier)
        self.calls, self.correction = [*self.calls[-1:], (found, t)], found.correction
        return found.clean_latents

    def between(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The same without a call: the evidence of x_t meets states that go on from those of the last two calls.

        The states are extrapolated linearly in log(t / (1 − t)). They change slowly; the evidence is fast and cheap, as are
        the corrections of `RecentTokens`.
        """
        found, now = self.calls[-1]
        states, scores = found.states, found.scores
        if len(self.calls) == 2 and self.calls[0][1] > 0:
            before, then = self.calls[0]
            then, now, t_ = (math.log(time / (1 - time)) for time in (then, now, t))
            share = (t_ - now) / (now - then)
            states = states + (states - before.states) * share
            scores = None if scores is None else scores + (scores - before.scores) * share
        time = torch.full((1,), t, device=x.device)
        found = replace(found, states=states, scores=scores, correction=self.correction)
        found = self.model.posterior.conclude(self.model, x, time, found)
        self.correction = found.correction
        return found.clean_latents
