"""Latents of texts in a file that knows which model wrote it: safetensors, or a torch file where its name ends with .pt."""

import hashlib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..whole_files import whole_file

FORMAT = "tokcom-latents-1"
TORCH_SUFFIXES = (".pt", ".pth")


def save_latents(path: str | Path, latents: list[torch.Tensor], token_counts: list[int], model: Any) -> Path:
    """Writes the latents of one or more texts.

    Args:
        path: file to write; replaced in one move, so an interrupted write leaves nothing half-written.
        latents: one (chunks, latent) tensor per text, not standardised, as `model.encode` returns them.
        token_counts: tokens of each text; what its last chunk holds beyond them is filling.
        model: the `TokComModel` or `TokComVAE` that encoded them.

    Raises:
        ValueError: a text whose tokens do not fill its chunks.
    """
    config = _vae(model).config
    for latent, count in zip(latents, token_counts, strict=True):
        if -(-count // config.chunk_size) != len(latent):
            raise ValueError(
                f"{count} tokens make {-(-count // config.chunk_size)} chunks, got {len(latent)} latents."
            )
    metadata = {
        "format": FORMAT,
        "model": str(getattr(model, "name_or_path", "") or ""),
        "fingerprint": vae_fingerprint(model),
        "chunk_size": str(config.chunk_size),
        "latent_size": str(config.latent_size),
        "token_count": json.dumps(list(token_counts)),
    }
    tensors = {f"latents.{i}": latent.detach().float().cpu().contiguous() for i, latent in enumerate(latents)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        if path.suffix in TORCH_SUFFIXES:
            torch.save(metadata | {"latents": list(tensors.values())}, unfinished)
        else:
            save_file(tensors, unfinished, metadata=metadata)
    return path


def load_latents(path: str | Path, model: Any) -> tuple[list[torch.Tensor], list[int]]:
    """Reads what `save_latents` wrote: one float32 (chunks, latent) tensor per text, and the token counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or foreign file, or latents of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Latents file {str(path)!r} does not exist.")
    metadata, tensors = (_read_torch if path.suffix in TORCH_SUFFIXES else _read_safetensors)(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no TokCom latents; write one with --mode encode.")
    config = _vae(model).config
    for name in ("chunk_size", "latent_size"):
        if int(metadata[name]) != getattr(config, name):
            raise ValueError(
                f"{path} was written by another model ({metadata['model'] or 'unnamed'}): its {name} is "
                f"{metadata[name]}, this model's is {getattr(config, name)}."
            )
    if metadata["fingerprint"] != vae_fingerprint(model):
        raise ValueError(
            f"{path} was written by another model ({metadata['model'] or 'unnamed'}): the weights of its VAE differ from "
            "this model's; decode with the model that encoded it."
        )
    counts = json.loads(metadata["token_count"])
    return [tensors[f"latents.{index}"] for index in range(len(counts))], counts


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); encode the text again.") from None
    return metadata, tensors


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{path} is truncated or no torch file of tensors ({reason}); encode the text again."
        ) from None
    metadata = content if isinstance(content, dict) else {}
    return metadata, {f"latents.{index}": tensor for index, tensor in enumerate(metadata.get("latents", []))}


def vae_fingerprint(model: Any) -> str:
    """SHA-256 over the VAE's weights, rounded to bfloat16: the same for a model loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_vae(model).named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _vae(model: Any) -> Any:
    return getattr(model, "vae", model)
