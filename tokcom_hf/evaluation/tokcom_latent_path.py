"""Statistics of the latents along the sampling path from noise to text."""

from typing import Any

import torch

from ..models.tokcom_denoise import Denoised, Predictions
from ..models.tokcom_flow_matching import sample, step_times
from ..models.tokcom_token_order import without_order
from .tokcom_denoising import BlockDenoiser


@torch.no_grad()
def sampling_path(model: Any, input_ids: torch.Tensor, num_steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Measures the root mean square of x_t and of the predicted clean latents at each Euler step, given true preceding text.

    On a healthy path, `rms` goes from noise_std to that of encoded text (1 if latents are standardised). Predictions with a
    much smaller `predicted_rms` are close to the mean of all latents; much larger ones lie outside the data.

    Args:
        model: `TokComModel`.
        input_ids: (rows, length) ids. With a context, they give the text before each block; without one, only the shape is
            used.
        num_steps: Euler steps; None means the config's.
        seed: seed of the noise.

    Returns:
        t, rms, predicted_rms: one value per denoiser call; `t` and `rms` also contain the end point.
        text_distance: mean squared distance of standardised latents, between the sampled ones and the encoding of their
            decoded text. 0 means that each is the latent of a text; with standardised latents, 2 is the distance of the
            latents of two unrelated texts.
    """
    model.eval()
    ids = input_ids.to(model.device)
    denoise = BlockDenoiser(model, ids)
    found: dict[str, Any] = {"t": [], "rms": [], "predicted_rms": []}

    def recorded(x: torch.Tensor, t: float, earlier: Denoised | None) -> Denoised:
        predicted = denoise.predict(x, t, earlier)
        found["t"].append(t)
        found["rms"].append(x.square().mean().sqrt().item())
        found["predicted_rms"].append(predicted.clean_latents.square().mean().sqrt().item())
        return predicted

    config = model.config
    shape = (len(ids), ids.shape[1] // config.vae.chunk_size, config.vae.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * config.noise_std
    times = step_times(config, config.num_steps if num_steps is None else num_steps)
    end = sample(Predictions(model, recorded), noise.to(model.device, model.dtype), times)
    found["t"].append(1.0)
    found["rms"].append(end.square().mean().sqrt().item())
    own_text = model.standardize(model.encode(model.decode(model.unstandardize(end))))
    return found | {"text_distance": without_order(model, own_text - end).square().mean().item()}
