"""Flow matching on the straight path x_t = (1 − t) · x0 + t · x1 (arXiv 2210.02747), as pure tensor functions.

x0 is noise N(0, noise_std²), x1 the clean latents, t ∈ [0, 1]; t broadcasts over the trailing dimensions. The velocity of
the path is v = x1 − x0 = (x1 − x_t) / (1 − t).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch

SAMPLERS = ("euler", "heun", "multistep", "multirate", "renoise")
# "multirate" steps of about SMALL_STEP in log(t / (1 − t)) from FIRST to LAST, of which few call the denoiser. Before FIRST
# the noisy latents say next to nothing, and behind LAST nothing new. Between two calls are MOST_SMALL steps at most.
SMALL_STEP, FIRST, LAST, MOST_SMALL = 0.45, 0.01, 0.95, 8
# Smallest 1 − t in the velocity weight, which would otherwise reach 1e8 at t = 1 − 1e-4.
MIN_REMAINING = 0.05
# Longest way from a call of the denoiser to the time of its use in training, in log(t / (1 − t)).
MOST_LAG = 4.0
# Smallest distance of a training time from 0 and 1.
EARLIEST = 1e-4

Denoise = Callable[[torch.Tensor, float], torch.Tensor]


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (batch,) or (batch, chunks) → t with as many dimensions as `like`."""
    return t.reshape(*t.shape, *[1] * (like.dim() - t.dim()))


def interpolate(noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 − t) · x0 + t · x1 for (batch, chunks, latent) tensors and t (batch,) or (batch, chunks)."""
    t = expand_time(t, clean)
    return (1 - t) * noise + t * clean


def velocity(clean: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """v = (x1 − x_t) / (1 − t), t < 1."""
    return (clean - x_t) / (1 - t)


def velocity_weight(t: torch.Tensor) -> torch.Tensor:
    """1 / max(1 − t, 0.05)², the factor that makes the squared error of x1 a squared error of the velocity."""
    return (1 - t).clamp(min=MIN_REMAINING) ** -2


def training_times(
    shape: tuple[int, ...], distribution: str, mean: float, std: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random times in [EARLIEST, 1 − EARLIEST]: "uniform", or "logit_normal" σ(N(mean, std²)) (arXiv 2403.03206)."""
    if distribution == "uniform":
        t = torch.rand(shape, generator=generator)
    else:
        t = torch.sigmoid(mean + std * torch.randn(shape, generator=generator))
    return t.clamp(EARLIEST, 1 - EARLIEST)


def call_times(t: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Times, like t, at which the denoiser is called for a prediction at t: half of them t, a quarter 0, others before t."""
    kind, lag = torch.rand(t.shape, generator=generator), MOST_LAG * torch.rand(t.shape, generator=generator)
    earlier = torch.sigmoid(torch.logit(t) - lag)
    return torch.where(kind < 0.5, t, torch.where(kind < 0.75, torch.zeros_like(t), earlier))


def sampling_times(num_steps: int, power: float = 1.0, start: float = 0.0) -> list[float]:
    """The num_steps + 1 times start + (1 − start) · u^power for u = 0 … 1 in equal steps; power > 1 shortens early steps."""
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) ** power
    return (start + (1 - start) * u).tolist()


def quantile_times(num_steps: int, mean: float, std: float, start: float = 0.0) -> list[float]:
    """num_steps + 1 times from `start` to 1, between which the training times σ(N(mean, std²)) fall equally often."""
    normal = torch.distributions.Normal(mean, std)
    first = normal.cdf(torch.logit(torch.tensor(start, dtype=torch.float64)))
    inner = first + (1 - first) * torch.arange(1, num_steps, dtype=torch.float64) / num_steps
    return [start, *torch.sigmoid(normal.icdf(inner)).tolist(), 1.0]


def step_times(config: Any, num_steps: int, start: float = 0.0) -> list[float]:
    """The num_steps + 1 times from `start` to 1 that a `TokComConfig` wants: quantiles, or equal steps to a power."""
    if config.step_quantiles:
        return quantile_times(num_steps, config.time_mean, config.time_std, start)
    return sampling_times(num_steps, config.step_power, start)


def denoising_steps(num_steps: int, start: float) -> int:
    """Steps that are left of num_steps from t = `start`: max(1, int(num_steps · (1 − start))), 5 of 50 from 0.9."""
    # Rounded first, because 50 · (1 − 0.9) is 4.999… in binary floating point.
    return max(1, int(round(num_steps * (1 - start), 9)))


def check_sampler(sampler: str, config: Any) -> str:
    """Returns the name of a sampler, if a model of this `TokComConfig` has it; raises ValueError otherwise."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if sampler == "multirate" and not config.token_posterior:
        raise ValueError("sampler='multirate' needs token_posterior=True, whose evidence it follows in small steps.")
    return sampler


def sample(denoise: Denoise, x: torch.Tensor, times: Sequence[float], *more: Any, **named: Any) -> torch.Tensor:
    """Latents at times[-1]: the last that `flow_path` yields, whose arguments it takes."""
    return deque(chain([x], flow_path(denoise, x, times, *more, **named)), maxlen=1).pop()


def flow_path(
    denoise: Denoise,
    x: torch.Tensor,
    times: Sequence[float],
    sampler: str = "euler",
    noise_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Follows the flow from x at times[0], and yields the latents at each later time.

    Args:
        denoise: (x_t, t) → predicted clean latents of the same shape.
        x: latents at times[0], (batch, chunks, latent).
        times: rising times, at most 1; of a single time, x is the end.
        sampler: "euler": x += Δt · v. "heun": the same with the mean of the velocities at both ends, two calls of `denoise`
            per step. "multistep": Euler on clean latents that are extrapolated from the last two predictions, linear in
            log(t / (1 − t)) (DPM-Solver++(2M), arXiv 2211.01095). "multirate": "multistep" in `small_times`, of which only
            the first of each step calls `denoise`, a `Predictions`; its `between` serves the others. "renoise":
            x_t' = (1 − t') · fresh noise + t' · x1, stochastic.
        noise_std: standard deviation of the fresh noise of "renoise".
        generator: CPU generator of the fresh noise.
    """
    if sampler == "multirate":
        yield from _multirate(denoise, x, times)
        return
    earlier = None
    for now, following in pairwise(times):
        clean = denoise(x, now)
        if following == 1:
            # At t = 1 all samplers arrive at the predicted clean latents.
            yield clean
            return
        if sampler == "renoise":
            noise = torch.randn(x.shape, generator=generator).to(x) * noise_std
            x = (1 - following) * noise + following * clean
            yield x
            continue
        if sampler == "multistep":
            predicted, clean = clean, _middle(clean, earlier, now, following)
            earlier = (predicted, now)
        v = velocity(clean, x, now)
        if sampler == "heun":
            ahead = x + (following - now) * v
            v = (v + velocity(denoise(ahead, following), ahead, following)) / 2
        x = x + (following - now) * v
        yield x


def _multirate(denoise: Any, x: torch.Tensor, times: Sequence[float]) -> Iterator[torch.Tensor]:
    """`flow_path` of "multirate"."""
    earlier = None
    for now, following in pairwise(times):
        called = denoise(x, now)
        for at, then in pairwise(small_times(now, following)):
            clean = called if at == now else denoise.between(x, at)
            if then == 1:
                x = clean
                break
            middle, earlier = _middle(clean, earlier, at, then), (clean, at)
            x = x + (then - at) * velocity(middle, x, at)
        yield x


def small_times(now: float, following: float) -> list[float]:
    """Times from `now` to `following`, in equal steps of log(t / (1 − t)) between FIRST and LAST."""
    low, high = max(now, min(FIRST, following / 2)), min(following, max(LAST, (1 + now) / 2))
    start, rise = _log_odds(low), _log_odds(high) - _log_odds(low)
    steps = min(max(1, round(rise / SMALL_STEP)), MOST_SMALL)
    inner = torch.sigmoid(start + rise * torch.arange(1, steps, dtype=torch.float64) / steps).tolist()
    return [*([now] if now < low else []), low, *inner, high, *([following] if high < following else [])]


def _log_odds(t: float) -> float:
    return math.log(t / (1 - t))


def _middle(
    clean: torch.Tensor, earlier: tuple[torch.Tensor, float] | None, now: float, following: float
) -> torch.Tensor:
    """Clean latents in the middle of a step, extrapolated from a prediction and the one before, (latents, time)."""
    if earlier is None or earlier[1] == 0:
        # From t = 0 on, a step in log(t / (1 − t)) is infinite, and what was predicted there tells no slope.
        return clean
    before, now, following = (_log_odds(t) for t in (earlier[1], now, following))
    return clean + (clean - earlier[0]) * (following - now) / (2 * (now - before))
