"""TokCom as functions on two models: load a checkpoint, generate, reconstruct, denoise, encode, decode.

    vae_model, denoised_model, model_args, config = load_checkpoint("checkpoints/best_diffusion.pt", device="cuda")
    ids = generate(vae_model, denoised_model, num_chunks=256, chunk_size=4, hidden_size=model_args.hidden_size,
                   noise_std=config["noise_std"], num_steps=50, batch_size=1, device="cuda")

These are the documented functions; `TokComModel` has the same operations, and more, as methods.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from .model_folders import load_pretrained
from .models.configuration_tokcom import TokComConfig
from .models.modeling_tokcom import TokComModel
from .models.modeling_tokcom_denoiser import DenoisedModel
from .models.modeling_tokcom_vae import TokComVAE
from .tokcom_checkpoint import checkpoint_settings, convert_checkpoint, is_checkpoint_file, read_checkpoint
from .tokcom_checkpoint_writer import undocumented
from .tokcom_model_args import DOCUMENTED_SETTINGS, ModelArgs, model_arguments

__all__ = ["ModelArgs", "decode", "denoise_reconstruct", "encode", "generate", "load_checkpoint", "reconstruct"]

Denoiser = DenoisedModel | TokComModel


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[TokComVAE, Denoiser | None, ModelArgs, dict[str, Any]]:
    """Loads a documented `.pt` file, or a model folder or Hub name, in evaluation mode.

    Returns:
        vae_model: the VAE.
        denoised_model: the denoiser; None if the file or folder holds a VAE only. It is the whole `TokComModel` if VAE and
            denoiser alone are not enough to generate: with a context encoder, standardised latents, or a flow other than
            the documented one.
        model_args: the VAE's sizes as attributes.
        config: dictionary with `tokenizer_path`, `max_length`, `chunk_size` and `noise_std`.

    Raises:
        OSError, ValueError: the file or model does not exist, is damaged, or is another kind of model.
    """
    if is_checkpoint_file(path):
        checkpoint = read_checkpoint(path)
        model: Any = convert_checkpoint(checkpoint, source=path)
        config = checkpoint_settings(checkpoint)
    else:
        model = load_pretrained(AutoModel, path)
        if not isinstance(model, (TokComModel, TokComVAE)):
            raise ValueError(f"{str(path)!r} holds a {type(model).__name__}, not a TokComModel or TokComVAE.")
        config = DOCUMENTED_SETTINGS | {"tokenizer_path": str(path)}
    model = model.to(device).eval()
    if isinstance(model, TokComVAE):
        return model, None, model_arguments(model.config), config | {"chunk_size": model.config.chunk_size}
    chunk_size = model.config.vae.chunk_size
    config |= {"chunk_size": chunk_size, "noise_std": model.config.noise_std}
    config["max_length"] = model.config.max_chunks * chunk_size
    alone = model.context is None and not any(name.startswith("flow.") for name in undocumented(model.config))
    return model.vae, model.denoiser if alone else model, model_arguments(model.config), config


def generate(
    vae_model: TokComVAE,
    denoised_model: Denoiser,
    num_chunks: int = 256,
    chunk_size: int | None = None,
    hidden_size: int | None = None,
    noise_std: float | None = None,
    num_steps: int | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """Generates token ids (batch_size, num_chunks · chunk_size) from noise.

    Args:
        vae_model, denoised_model: models returned by `load_checkpoint`.
        num_chunks: number of chunks per row.
        chunk_size, hidden_size: checked against the VAE's values; None skips the check.
        noise_std: standard deviation of the noise x_0; None means the model's own, 0.05 for a `DenoisedModel`.
        num_steps: Euler steps of the flow; None means the model's own, 50 for a `DenoisedModel`.
        batch_size: number of rows.
        device: device that both models are moved to; None leaves them on their own.
        generator: CPU generator of the noise.

    Raises:
        TypeError: a model has the wrong class.
        ValueError: `chunk_size` or `hidden_size` differs from the model's, the models do not belong together, or a number
            is below 1.
    """
    model = _whole(vae_model, denoised_model, noise_std, device)
    for name, value in (("chunk_size", chunk_size), ("hidden_size", hidden_size)):
        own = getattr(vae_model.config, name)
        if value is not None and value != own:
            raise ValueError(
                f"{name}={value} contradicts the model, whose {name} is {own}; leave {name} out, or give {own}."
            )
    options: dict[str, Any] = {} if noise_std is None else {"temperature": _temperature(model, noise_std)}
    return model.generate(
        num_chunks=num_chunks, num_steps=num_steps, batch_size=batch_size, generator=generator, **options
    )


def reconstruct(
    vae_model: TokComVAE, input_ids: torch.LongTensor, device: str | torch.device | None = None
) -> torch.LongTensor:
    """Encodes and decodes ids (batch, length); returns ids (batch, length)."""
    return decode(vae_model, encode(vae_model, input_ids, device))


def denoise_reconstruct(
    vae_model: TokComVAE,
    denoised_model: Denoiser,
    input_ids: torch.LongTensor,
    noise_level: float = 0.5,
    noise_std: float | None = None,
    num_steps: int | None = None,
    device: str | torch.device | None = None,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """Encodes ids (batch, length), mixes the latents with noise, denoises and decodes them; returns ids (batch, length).

    Args:
        input_ids: (batch, length) token ids.
        noise_level: flow time t of the noisy latents, in [0, 1]: 0 is pure noise, 1 is no noise (as `reconstruct`).
        vae_model, denoised_model, noise_std, num_steps, device, generator: see `generate`.

    Raises:
        ValueError: `noise_std` differs from the model's, or the models do not belong together.
    """
    model = _whole(vae_model, denoised_model, noise_std, device)
    if noise_std is not None and noise_std != model.config.noise_std:
        raise ValueError(
            f"noise_std={noise_std} contradicts the model, whose flow has {model.config.noise_std}; leave it out."
        )
    num_steps = model.config.num_steps if num_steps is None else num_steps
    return model.denoise_reconstruct(input_ids.to(model.device), noise_level, num_steps, generator=generator)


@torch.no_grad()
def encode(
    vae_model: TokComVAE, input_ids: torch.LongTensor, device: str | torch.device | None = None
) -> torch.Tensor:
    """Encodes ids (batch, length) to latents (batch, length / chunk_size, latent_size)."""
    vae = _moved(vae_model, device)
    return vae.encode(input_ids.to(vae.device))


@torch.no_grad()
def decode(vae_model: TokComVAE, latents: torch.Tensor, device: str | torch.device | None = None) -> torch.LongTensor:
    """Decodes latents (batch, chunks, latent_size) to ids (batch, chunks · chunk_size)."""
    vae = _moved(vae_model, device)
    return vae.decode(latents.to(vae.device))


def _moved(model: Any, device: str | torch.device | None) -> Any:
    return model if device is None else model.to(device)


def _whole(vae_model: Any, denoised_model: Any, noise_std: float | None, device: str | torch.device | None) -> Any:
    """Returns `denoised_model` if it is a `TokComModel`, else a `TokComModel` of the VAE and the `DenoisedModel`."""
    if isinstance(denoised_model, TokComModel):
        if denoised_model.vae is not vae_model:
            raise ValueError(
                "vae_model is not the VAE of denoised_model; pass both as the same load_checkpoint call returned them."
            )
        return _moved(denoised_model, device)
    if not isinstance(denoised_model, DenoisedModel):
        raise TypeError(
            f"denoised_model must be a DenoisedModel or a TokComModel, got {type(denoised_model).__name__}; with a VAE "
            "alone, use encode, decode or reconstruct."
        )
    if not isinstance(vae_model, TokComVAE):
        raise TypeError(f"vae_model must be a TokComVAE, got {type(vae_model).__name__}.")
    vae_config: Any = vae_model.config
    denoiser_config: Any = denoised_model.config
    if denoiser_config.context_size is not None:
        raise ValueError("This denoiser needs a context; pass the TokComModel that it belongs to as denoised_model.")
    config = TokComConfig(
        vae=vae_config,
        denoiser=denoiser_config,
        noise_std=DOCUMENTED_SETTINGS["noise_std"] if noise_std is None else noise_std,
    )
    # On the meta device, because its own parts are replaced and would double the memory.
    with torch.device("meta"):
        model = TokComModel(config)
    model.vae, model.denoiser = _moved(vae_model, device), _moved(denoised_model, device)
    latent_size = vae_config.latent_size
    model.latent_mean, model.latent_std = torch.zeros(latent_size), torch.ones(latent_size)
    return model


def _temperature(model: Any, noise_std: float) -> float:
    if noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}.")
    return noise_std / model.config.noise_std if model.config.noise_std else 1.0
