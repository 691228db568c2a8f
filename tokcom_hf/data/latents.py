"""Saves latents of texts with a fingerprint of the model: as safetensors, or as a torch file for the suffix .pt."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..model_folders import check_safetensors
from ..torch_files import DAMAGED
from ..whole_files import whole_file

FORMAT = "tokcom-latents-1"
NEEDED = ("model", "fingerprint", "chunk_size", "latent_size", "token_count")
TORCH_SUFFIXES = (".pt", ".pth")


def save_latents(path: str | Path, latents: list[torch.Tensor], token_counts: list[int], model: Any) -> Path:
    """Writes the latents of one or more texts.

    Args:
        path: file to write; it is renamed into place, so an interrupted write leaves no partial file.
        latents: one (chunks, latent) tensor per text, not standardised, as `model.encode` returns them.
        token_counts: number of tokens of each text; the last chunk may hold padding after them.
        model: the `TokComModel` or `TokComVAE` that encoded the texts.

    Raises:
        ValueError: a text's number of latents differs from the number of chunks its tokens make.
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
    """Reads a file of `save_latents`: one float32 (chunks, latent) tensor per text, and the token counts.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, is no latents file, or was written by another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Latents file {str(path)!r} does not exist.")
    metadata, tensors = (_read_torch if path.suffix in TORCH_SUFFIXES else _read_safetensors)(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no TokCom latents; write one with --mode encode.")
    missing = [name for name in NEEDED if not isinstance(metadata.get(name), str)]
    if missing:
        raise ValueError(f"{path} is damaged: its metadata lacks {', '.join(missing)}; encode the text again.")
    config = _vae(model).config
    for name in ("chunk_size", "latent_size"):
        if metadata[name] != str(getattr(config, name)):
            raise ValueError(
                f"{path} was written by another model ({metadata['model'] or 'unnamed'}): its {name} is "
                f"{metadata[name]}, this model's is {getattr(config, name)}."
            )
    if metadata["fingerprint"] != vae_fingerprint(model):
        raise ValueError(
            f"{path} was written by another model ({metadata['model'] or 'unnamed'}): the weights of its VAE differ from "
            "this model's; decode with the model that encoded it."
        )
    return _checked(path, metadata["token_count"], tensors, config)


def _checked(
    path: Path, token_count: str, tensors: dict[str, Any], config: Any
) -> tuple[list[torch.Tensor], list[int]]:
    """Returns latents and token counts after checking them against each other and against the VAE's config."""
    try:
        counts = json.loads(token_count)
    except (ValueError, RecursionError):
        counts = None
    if not isinstance(counts, list) or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{path} is damaged: its token_count is no list of integers above 0; encode the text again.")
    if set(tensors) != {f"latents.{index}" for index in range(len(counts))}:
        raise ValueError(
            f"{path} is damaged: it holds {len(tensors)} latents for {len(counts)} texts; encode them again."
        )
    latents = [tensors[f"latents.{index}"] for index in range(len(counts))]
    for index, (latent, count) in enumerate(zip(latents, counts)):
        wanted = (-(-count // config.chunk_size), config.latent_size)
        if not torch.is_tensor(latent) or not latent.is_floating_point() or tuple(latent.shape) != wanted:
            got = f"{latent.dtype} {tuple(latent.shape)}" if torch.is_tensor(latent) else type(latent).__name__
            raise ValueError(
                f"{path} is damaged: the latents of text {index} must be floats {wanted} for {count} tokens, got {got}; "
                "encode the text again."
            )
        if not bool(latent.isfinite().all()):
            raise ValueError(f"{path} is damaged: the latents of text {index} hold NaN or infinite values.")
    return latents, counts


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    check_safetensors(path)
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
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{path} is truncated or no torch file of tensors ({reason}); encode the text again."
        ) from None
    metadata = content if isinstance(content, dict) else {}
    latents = metadata.get("latents")
    return metadata, {
        f"latents.{index}": one for index, one in enumerate(latents if isinstance(latents, list) else [])
    }


def vae_fingerprint(model: Any) -> str:
    """SHA-256 over the VAE's weights, rounded to bfloat16: the same for a model loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_vae(model).named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _vae(model: Any) -> Any:
    return getattr(model, "vae", model)
