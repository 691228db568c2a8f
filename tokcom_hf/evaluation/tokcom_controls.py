"""The samplers of a TokCom model that stand in one table: its dial, and controls that lack one part of it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..models.tokcom_denoise import with_parts
from .text_generation import HeadSampler, Sampler, TokComSampler


class NoDenoiser(nn.Module):
    """Stands where a denoiser stands and adds nothing to what it reads."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(clean_latents=torch.zeros_like(hidden))


def without_denoiser(model: Any) -> Any:
    """A `TokComModel` with `token_posterior` that shares everything with `model` and writes without its denoiser.

    Heads, evidence, recent tokens and, with `read_guesses`, the context still lead its flow from noise to latents. What
    the model does better than this is the denoiser's work.

    Raises:
        ValueError: the model has no `TokenPosterior`: its denoiser alone predicts the latents.
    """
    if model.posterior is None:
        raise ValueError("Only a model with token_posterior can write without its denoiser.")
    return with_parts(model, denoiser=NoDenoiser())


def tokcom_samplers(model: Any, settings: dict[str, Any], block_sizes: list[int]) -> dict[str, Sampler]:
    """Name -> sampler of each row.

    Args:
        model: a `TokComModel`.
        settings: arguments of `generate` that all rows share but for what their names say; `num_steps` is one of them.
        block_sizes: chunks per block of rows of their own; 0 is the whole sequence.
    """
    samplers: dict[str, Sampler] = {}
    if model.config.context is not None:
        samplers["heads alone"] = HeadSampler(model)
    samplers["TokCom, noise removed"] = TokComSampler(model, settings | {"temperature": 0.0, "best_of": 1})
    samplers["TokCom, one step"] = TokComSampler(model, settings | {"num_steps": 1})
    blocks: dict[str, dict[str, Any]] = {
        f"TokCom, block {size or 'all'}": {"block_size": size} for size in block_sizes
    }
    dial = {f"TokCom, {settings['num_steps']} steps": {}, **blocks}
    samplers |= {name: TokComSampler(model, settings | change) for name, change in dial.items()}
    if model.posterior is not None:
        control = without_denoiser(model)
        samplers |= {
            f"{name}, denoiser removed": TokComSampler(control, settings | change) for name, change in dial.items()
        }
    return samplers
