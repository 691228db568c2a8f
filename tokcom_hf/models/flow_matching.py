"""Flow matching on the straight path x_t = (1 − t) · x0 + t · x1 (arXiv 2210.02747), as pure tensor functions.

x0 is noise N(0, noise_std²), x1 the clean latents, t ∈ [0, 1]; t broadcasts over the trailing dimensions. The velocity of
the path is v = x1 − x0 = (x1 − x_t) / (1 − t).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

SAMPLERS = ("euler", "renoise", "heun")
TIME_GRIDS = ("uniform", "cosine", "quadratic")
# 1 − t is kept at least this large in divisions: the velocity weight would be 1e8 at t = 1 − 1e-4.
MIN_REMAINING = 0.05
# Training times keep this far from 0 and 1.
EARLIEST = 1e-4

Time = float | torch.Tensor
Denoise = Callable[[torch.Tensor, Any], torch.Tensor]


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (batch,) or (batch, chunks) → same number of dimensions as `like`."""
    return t.reshape(*t.shape, *[1] * (like.dim() - t.dim()))


def interpolate(noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 − t) · x0 + t · x1 for (batch, chunks, latent) tensors and t (batch,) or (batch, chunks)."""
    t = expand_time(t, clean)
    return (1 - t) * noise + t * clean


def clean_to_velocity(clean: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float, floor: float = 1e-6):
    """v = (x1 − x_t) / max(1 − t, floor)."""
    remaining = (1 - expand_time(t, clean)).clamp(min=floor) if torch.is_tensor(t) else max(1 - t, floor)
    return (clean - x_t) / remaining


def velocity_to_clean(velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float):
    """x1 = x_t + (1 − t) · v."""
    remaining = 1 - expand_time(t, velocity) if torch.is_tensor(t) else 1 - t
    return x_t + remaining * velocity


def velocity_weight(t: torch.Tensor) -> torch.Tensor:
    """1 / max(1 − t, 0.05)²: a squared error of x1 with this weight is the squared error of the velocity."""
    return (1 - t).clamp(min=MIN_REMAINING) ** -2


def sample_times(
    shape: tuple[int, ...], distribution: str, mean: float, std: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Training times in [EARLIEST, 1 − EARLIEST]: "uniform", or "logit_normal" σ(N(mean, std²))."""
    if distribution == "uniform":
        t = torch.rand(shape, generator=generator)
    elif distribution == "logit_normal":
        t = torch.sigmoid(mean + std * torch.randn(shape, generator=generator))
    else:
        raise ValueError(f"time_distribution must be 'uniform' or 'logit_normal', got {distribution!r}.")
    return t.clamp(EARLIEST, 1 - EARLIEST)


def time_grid(num_steps: int, kind: str = "uniform", start: float = 0.0) -> list[float]:
    """num_steps + 1 times from `start` to 1.

    "quadratic" takes small steps near the noise (t = u²), "cosine" near both ends (t = (1 − cos πu) / 2).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if kind == "quadratic":
        u = u**2
    elif kind == "cosine":
        u = (1 - torch.cos(torch.pi * u)) / 2
    elif kind != "uniform":
        raise ValueError(f"time_grid must be one of {', '.join(TIME_GRIDS)}, got {kind!r}.")
    return (start + (1 - start) * u).tolist()


def lagged_times(times: list[float], tokens: int, lag: float) -> torch.Tensor:
    """Times of the tokens of a chunk when each waits for the one before it, (len(times), tokens).

    lag: 0: all have the same time; 1: the last starts when the first is finished.
    """
    place = torch.arange(tokens, dtype=torch.float64) / max(tokens - 1, 1)
    return (torch.tensor(times, dtype=torch.float64)[:, None] * (1 + lag) - lag * place).clamp(0, 1).float()


def commit_places(tokens: int, num_steps: int) -> list[list[int]]:
    """Places of a chunk in the order in which the sampler "commit" draws them: one per pass, several with fewer steps."""
    return [part.tolist() for part in torch.arange(tokens).tensor_split(min(num_steps, tokens))]


def sample(
    denoise: Denoise,
    x: torch.Tensor,
    times: Sequence[Time],
    sampler: str = "euler",
    noise_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Follows the flow from x at times[0] to t = 1.

    Args:
        denoise: (x_t, t) → predicted clean latents, same shape, t being one of `times`; one forward of the network.
        x: (batch, chunks, latent) at times[0].
        times: rising, the last is 1; numbers, or tensors (1, 1, latent) where the entries of a latent have their own.
        sampler: "euler": x += Δt · v. "heun": second order, velocity averaged over both ends (two forwards per step, one
            for the last). "renoise": x_t' = (1 − t') · fresh noise + t' · x1, stochastic.
        noise_std: standard deviation of x0, used by "renoise".
        generator: seeds the noise of "renoise".

    Returns:
        The clean latents, (batch, chunks, latent).
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or commit in generate; got {sampler!r}.")
    for now, following in pairwise(times):
        clean = denoise(x, now)
        # From the last time any of the three rules lands on the predicted clean latents.
        if bool(torch.as_tensor(following >= 1.0).all()):
            return clean
        if sampler == "renoise":
            noise = torch.randn(x.shape, generator=generator).to(x) * noise_std
            x = (1 - following) * noise + following * clean
            continue
        velocity = clean_to_velocity(clean, x, now)
        if sampler == "heun":
            ahead = x + (following - now) * velocity
            velocity = (velocity + clean_to_velocity(denoise(ahead, following), ahead, following)) / 2
        x = x + (following - now) * velocity
    return x
