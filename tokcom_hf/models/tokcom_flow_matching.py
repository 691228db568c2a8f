"""Flow matching on the straight path x_t = (1 − t) · x0 + t · x1 (arXiv 2210.02747), as pure tensor functions.

x0 is noise N(0, noise_std²), x1 the clean latents, t ∈ [0, 1]; t broadcasts over the trailing dimensions. The velocity of
the path is v = x1 − x0 = (x1 − x_t) / (1 − t).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

SAMPLERS = ("euler", "heun", "renoise")
# 1 − t is kept at least this large in divisions: the velocity weight would be 1e8 at t = 1 − 1e-4.
MIN_REMAINING = 0.05
# Training times keep this far from 0 and 1.
EARLIEST = 1e-4

Denoise = Callable[[torch.Tensor, float], torch.Tensor]


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (batch,) or (batch, chunks) → same number of dimensions as `like`."""
    return t.reshape(*t.shape, *[1] * (like.dim() - t.dim()))


def interpolate(noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 − t) · x0 + t · x1 for (batch, chunks, latent) tensors and t (batch,) or (batch, chunks)."""
    t = expand_time(t, clean)
    return (1 - t) * noise + t * clean


def velocity(clean: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """v = (x1 − x_t) / (1 − t), t < 1."""
    return (clean - x_t) / (1 - t)


def velocity_weight(t: torch.Tensor) -> torch.Tensor:
    """1 / max(1 − t, 0.05)²: a squared error of x1 with this weight is the squared error of the velocity."""
    return (1 - t).clamp(min=MIN_REMAINING) ** -2


def training_times(
    shape: tuple[int, ...], distribution: str, mean: float, std: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Times in [EARLIEST, 1 − EARLIEST]: "uniform", or "logit_normal" σ(N(mean, std²)) (arXiv 2403.03206)."""
    if distribution == "uniform":
        t = torch.rand(shape, generator=generator)
    else:
        t = torch.sigmoid(mean + std * torch.randn(shape, generator=generator))
    return t.clamp(EARLIEST, 1 - EARLIEST)


def sampling_times(num_steps: int, power: float = 1.0, start: float = 0.0) -> list[float]:
    """num_steps + 1 times start + (1 − start) · u^power, u = 0 … 1 in equal steps; power > 1 makes early steps small."""
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) ** power
    return (start + (1 - start) * u).tolist()


def denoising_steps(num_steps: int, start: float) -> int:
    """Steps from t = `start` on, as documented: max(1, int(num_steps · (1 − start))), 5 of 50 from 0.9."""
    # 50 · (1 − 0.9) is 4.999… in binary floating point.
    return max(1, int(round(num_steps * (1 - start), 9)))


def sample(
    denoise: Denoise,
    x: torch.Tensor,
    times: Sequence[float],
    sampler: str = "euler",
    noise_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Follows the flow from x at times[0] to t = 1.

    Args:
        denoise: (x_t, t) → predicted clean latents, same shape; one forward of the network.
        x: (batch, chunks, latent) at times[0].
        times: rising; the last is 1.
        sampler: "euler": x += Δt · v. "heun": second order, velocity averaged over both ends (two forwards per step, one
            for the last). "renoise": x_t' = (1 − t') · fresh noise + t' · x1, stochastic.
        noise_std: standard deviation of the fresh noise; only "renoise" draws any.
        generator: CPU generator of the fresh noise.

    Returns:
        The clean latents, (batch, chunks, latent).
    """
    for now, following in pairwise(times):
        clean = denoise(x, now)
        if following == 1:
            # At t = 1 each of the three rules lands on the predicted clean latents.
            return clean
        if sampler == "renoise":
            noise = torch.randn(x.shape, generator=generator).to(x) * noise_std
            x = (1 - following) * noise + following * clean
            continue
        v = velocity(clean, x, now)
        if sampler == "heun":
            ahead = x + (following - now) * v
            v = (v + velocity(denoise(ahead, following), ahead, following)) / 2
        x = x + (following - now) * v
    return x
