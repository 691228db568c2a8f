"""Writes documented TokCom checkpoints (`best_vae.pt`, `best_diffusion.pt`) of models of the documented architecture."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .models.configuration_tokcom import TokComConfig
from .models.modeling_tokcom import TokComModel
from .models.modeling_tokcom_vae import TokComVAE
from .tokcom_checkpoint import StateDict
from .tokcom_model_args import DOCUMENTED_SETTINGS, documented_config, model_arguments
from .whole_files import whole_file

# Config fields that change a model's outputs but have no place in the model_args and config of a documented file.
DECIDING = {
    "vae": ("latent_size", "num_decoder_layers", "chunk_projection", "variational", "fixed_norm"),
    "denoiser": (
        "latent_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "rms_norm_eps", "rope_theta", "time_scale", "context_size", "self_conditioning",
    ),
    "flow": ("standardize_latents", "clean_prefix", "num_steps", "step_power", "step_quantiles", "sampler"),
}  # fmt: skip


def save_checkpoint(
    path: str | Path,
    model: TokComModel | TokComVAE,
    *,
    epoch: int | None,
    val_loss: float | None,
    tokenizer_path: str,
    max_length: int = 1024,
) -> Path:
    """Writes a model as a documented checkpoint file: stage `vae` for a `TokComVAE`, stage `diffusion` for a `TokComModel`.

    Args:
        path: file to write; it is renamed into place when complete.
        model: the model to save.
        epoch, val_loss: epoch and validation loss of the weights; None if they were not measured.
        tokenizer_path: name or folder of the tokenizer.
        max_length: tokens per training row, for a `TokComVAE`; a `TokComModel` has it in its config.

    Raises:
        ValueError: the format cannot describe the model's architecture; the message lists the fields that differ.
    """
    whole: Any = model if isinstance(model, TokComModel) else None
    vae: Any = model if whole is None else whole.vae
    settings: dict[str, Any] = {"tokenizer_path": tokenizer_path, "max_length": max_length}
    settings |= {"chunk_size": vae.config.chunk_size, "noise_std": DOCUMENTED_SETTINGS["noise_std"]}
    if whole:
        settings |= {
            "max_length": model.config.max_chunks * vae.config.chunk_size,
            "noise_std": model.config.noise_std,
        }
    check_documented(model.config)
    checkpoint = {
        "epoch": epoch,
        "stage": "vae" if whole is None else "diffusion",
        "val_loss": val_loss,
        "model_args": asdict(model_arguments(vae.config)),
        "config": settings,
        "vae_model_state_dict": documented_vae_state(vae),
        "denoised_model_state_dict": {} if whole is None else _on_cpu(whole.denoiser.state_dict()),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        torch.save(checkpoint, unfinished)
    return path


def check_documented(config: Any) -> None:
    """Raises ValueError if the documented format cannot hold a model; the message lists the fields that differ."""
    differing = undocumented(config)
    if differing:
        raise ValueError(
            f"The documented checkpoint format cannot hold this model: {', '.join(differing)}. Save it with save_pretrained."
        )


def undocumented(config: Any) -> list[str]:
    """Lists the fields of a model's config that the documented format cannot hold, as `part.field=value`."""
    documented: Any = documented_config(model_arguments(config), DOCUMENTED_SETTINGS)
    pairs: dict[str, tuple[Any, Any]] = {"vae": (getattr(config, "vae", config), documented.vae)}
    if isinstance(config, TokComConfig):
        pairs |= {"denoiser": (config.denoiser, documented.denoiser), "flow": (config, documented)}
    return [
        f"{part}.{name}={getattr(own, name)!r}"
        for part, (own, expected) in pairs.items()
        for name in DECIDING[part]
        if getattr(own, name) != getattr(expected, name)
    ]


def documented_vae_state(vae: TokComVAE) -> StateDict:
    """Converts VAE weights to documented names: copies the embedding for each user, omits weights used in training only."""
    state = {name: value for name, value in _on_cpu(vae.state_dict()).items() if not name.startswith("hint.")}
    embedding = state["embed_tokens.weight"]
    del state["lm_head.weight"]
    return state | {"encoder.embed_tokens.weight": embedding, "decoder.lm_head.weight": embedding}


def _on_cpu(state: StateDict) -> StateDict:
    return {name: value.detach().cpu() for name, value in state.items()}
