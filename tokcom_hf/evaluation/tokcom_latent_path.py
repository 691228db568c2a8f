"""Health of the latents on their way from noise to text."""

from typing import Any

import torch

from ..models.tokcom_flow_matching import sample, sampling_times
from .tokcom_denoising import BlockDenoiser


@torch.no_grad()
def sampling_path(model: Any, input_ids: torch.Tensor, num_steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Root mean square of x_t and of the predicted clean latents at each step of Euler sampling, behind real text.

    On a healthy path `rms` runs from noise_std to the latents' own (1 where they are standardised); a prediction that stays
    far below it is the mean of all chunks, one that grows far above it has left the data.

    Args:
        model: `TokComModel`.
        input_ids: (rows, length): with a context, the text that precedes each block; its shape alone counts without one.
        num_steps: None takes the config's.

    Returns:
        t, rms, predicted_rms: one value per denoiser call, plus the end point in `t` and `rms`. text_distance: mean squared
        distance, in the flow's space, of the drawn latents to the encoding of their own decoded text; 0 = each is the latent
        of a text, 2 = as far as the latents of two texts where these are standardised.
    """
    model.eval()
    ids = input_ids.to(model.device)
    denoise, condition = BlockDenoiser(model, ids), model.config.denoiser.self_conditioning
    found: dict[str, Any] = {"t": [], "rms": [], "predicted_rms": []}
    memory: dict[str, torch.Tensor | None] = {"clean": None}

    def recorded(x: torch.Tensor, t: float) -> torch.Tensor:
        clean = memory["clean"] = denoise(x, t, memory["clean"] if condition else None)
        found["t"].append(t)
        found["rms"].append(x.square().mean().sqrt().item())
        found["predicted_rms"].append(clean.square().mean().sqrt().item())
        return clean

    config = model.config
    shape = (len(ids), ids.shape[1] // config.vae.chunk_size, config.vae.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * config.noise_std
    times = sampling_times(config.num_steps if num_steps is None else num_steps, config.step_power)
    end = sample(recorded, noise.to(model.device, model.dtype), times)
    found["t"].append(1.0)
    found["rms"].append(end.square().mean().sqrt().item())
    own_text = model.standardize(model.encode(model.decode(model.unstandardize(end))))
    return found | {"text_distance": (own_text - end).square().mean().item()}
