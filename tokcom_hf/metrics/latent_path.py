"""Health of the latents on their way from noise to text."""

from typing import Any

import torch

from ..models.flow_matching import sample, time_grid


@torch.no_grad()
def sampling_path(
    model: Any, batch_size: int = 8, num_chunks: int = 64, num_steps: int = 16, seed: int = 0
) -> dict[str, list[float]]:
    """Root mean square of x_t and of the predicted clean latents at each step of Euler sampling.

    On a healthy path `rms` runs from noise_std to the latents' own (1 where they are standardised); a prediction that stays
    far below it is the mean of all chunks, one that grows far above it has left the data.

    Returns:
        {"t", "rms", "predicted_rms"}: one value per denoiser call, plus the end point in `t` and `rms`.
    """
    model.eval()
    found: dict[str, list[float]] = {"t": [], "rms": [], "predicted_rms": []}
    memory: dict[str, torch.Tensor | None] = {"clean": None}

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        condition = memory["clean"] if model.config.denoiser.self_conditioning else None
        steps = torch.full((len(x),), t, device=x.device)
        clean = memory["clean"] = model(x, steps, self_condition=condition).clean_latents
        found["t"].append(t)
        found["rms"].append(x.square().mean().sqrt().item())
        found["predicted_rms"].append(clean.square().mean().sqrt().item())
        return clean

    shape = (batch_size, num_chunks, model.config.vae.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * model.config.noise_std
    end = sample(denoise, noise.to(model.device, model.dtype), time_grid(num_steps))
    found["t"].append(1.0)
    found["rms"].append(end.square().mean().sqrt().item())
    return found
