"""Reads documented TokCom checkpoints (`best_vae.pt`, `best_diffusion.pt`) into this package's models.

Such a file is a dictionary with `epoch, stage, val_loss, model_args, config, vae_model_state_dict,
denoised_model_state_dict`. Its weights have the names of this package's models, except for rotary tables and copies of tied
tensors.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch

from .data.tokenizers import load_tokenizer
from .models.modeling_tokcom import TokComModel
from .models.modeling_tokcom_vae import TokComVAE
from .models.shared_layers import rotary_embeddings
from .tokcom_model_args import DOCUMENTED_SETTINGS, PRINTED_KEYS, ModelArgs, check_settings, documented_config
from .torch_files import DAMAGED

StateDict = dict[str, torch.Tensor]

# Parts of a model -> key of their weights in a file.
STATE_OF = {"": "vae_model_state_dict", "vae": "vae_model_state_dict", "denoiser": "denoised_model_state_dict"}

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
ROTARY = ".self_attn.rope."
# The file stores the embedding again for each module that uses it, and for the tied head.
COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.lm_head.weight")
# Parts of weight names that DistributedDataParallel and torch.compile add.
WRAPPERS = ("module", "_orig_mod")


def is_checkpoint_file(name: str | os.PathLike) -> bool:
    """Returns whether a name is that of a checkpoint file, by its suffix; folders and Hub names are not."""
    path = Path(name)
    return path.suffix in SUFFIXES and not path.is_dir()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint file with `weights_only=True` and checks that it has the documented format.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, is no PyTorch file, contains code, or is another kind of checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {str(path)!r} does not exist.")
    try:
        # Memory-mapped, so that the full-size file (about 4.7 GB) is not in memory in addition to the model.
        mapped = zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0][:160]
        raise ValueError(
            f"{path} is no PyTorch checkpoint of plain tensors, or is damaged; only tensors, numbers and text are read "
            f"from it ({reason})."
        ) from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"{path} is truncated or no PyTorch checkpoint ({reason}); copy it again.") from None
    needed = ("model_args", "vae_model_state_dict")
    missing = [key for key in needed if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict)]
    if missing:
        found = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is no TokCom checkpoint: it lacks {' and '.join(missing)} (it has {found[:160]}).")
    absent = [key for key in PRINTED_KEYS if key not in checkpoint["model_args"]]
    if absent:
        raise ValueError(f"{path} is no TokCom checkpoint: its model_args lack {', '.join(absent)}.")
    return checkpoint


def checkpoint_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the `config` of a checkpoint, with documented values for missing keys."""
    given = checkpoint.get("config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config must be a dictionary of settings, got {type(given).__name__}.")
    given = dict(given)
    if "max_seq_len" in given:
        given.setdefault("max_length", given["max_seq_len"])
    if "chunk_size" in checkpoint["model_args"]:
        given.setdefault("chunk_size", checkpoint["model_args"]["chunk_size"])
    return DOCUMENTED_SETTINGS | given


def checkpoint_tokenizer(checkpoint: dict[str, Any], path: str | Path, name: str | None = None) -> Any:
    """Loads the tokenizer of a checkpoint file: `name`, else its `config['tokenizer_path']`, else the one beside it.

    Raises:
        OSError: no tokenizer can be loaded.
    """
    if name is not None:
        return load_tokenizer(name)
    wanted, folder = str(checkpoint_settings(checkpoint)["tokenizer_path"]), Path(path).parent
    try:
        return load_tokenizer(wanted)
    except OSError as error:
        for place in (folder, folder / "vae"):
            if (place / "tokenizer.json").is_file():
                return load_tokenizer(place)
        raise OSError(
            f"{path} was trained with the tokenizer {wanted!r}, which cannot be loaded; give it, or a copy of it, with "
            f"--tokenizer. ({error})"
        ) from None


def load_checkpoint_file(path: str | Path, tokenizer: str | None = None) -> tuple[TokComModel | TokComVAE, Any]:
    """Loads model and tokenizer of a checkpoint file; `tokenizer` replaces the name in the file.

    Raises:
        OSError, ValueError: see `read_checkpoint`, `checkpoint_tokenizer` and `convert_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    loaded = checkpoint_tokenizer(checkpoint, path, tokenizer)
    return convert_checkpoint(checkpoint, loaded.eos_token_id, path), loaded


def convert_checkpoint(
    checkpoint: dict[str, Any], eos_token_id: int | None = None, source: str | Path | None = None
) -> TokComModel | TokComVAE:
    """Builds the model of a checkpoint: a `TokComModel`, or a `TokComVAE` if the checkpoint has no denoiser (stage one).

    Args:
        checkpoint: dictionary returned by `read_checkpoint`.
        eos_token_id: EOS id of the checkpoint's tokenizer.
        source: path of the file, for error messages.

    Raises:
        ValueError: sizes or settings are out of range; weights are missing, unknown, not finite, or of another shape than
            `model_args` give; or the head is not tied to the embedding.
    """
    try:
        return _converted(checkpoint, eos_token_id)
    except ValueError as error:
        raise ValueError(str(error) if source is None else f"{source}: {error}") from None


def _converted(checkpoint: dict[str, Any], eos_token_id: int | None) -> TokComModel | TokComVAE:
    arguments, settings = ModelArgs.from_dict(checkpoint["model_args"]), checkpoint_settings(checkpoint)
    check_settings(settings)
    vae_weights = vae_state(checkpoint["vae_model_state_dict"], arguments.shape())
    check_layers(vae_weights, "encoder.layers.", arguments.num_hidden_layers, STATE_OF["vae"])
    # Only some files count the omni token in vocab_size, so the embedding's rows are counted.
    rows = len(vae_weights["embed_tokens.weight"])
    if rows - arguments.vocab_size not in (0, 1):
        raise ValueError(f"embed_tokens.weight has {rows} rows, but model_args.vocab_size is {arguments.vocab_size}.")
    arguments.vocab_size = rows
    denoiser_weights = checkpoint.get("denoised_model_state_dict")
    if not denoiser_weights:
        config = arguments.vae_config(settings["chunk_size"])
        return fill(partial(TokComVAE, config), {"": vae_weights}).eval()
    denoiser_weights = drop_rotary(plain_state(denoiser_weights, "denoised_model_state_dict"), arguments.shape())
    check_layers(denoiser_weights, "layers.", arguments.num_hidden_layers, STATE_OF["denoiser"])
    build = partial(TokComModel, documented_config(arguments, settings, eos_token_id))
    return fill(build, {"vae": vae_weights, "denoiser": denoiser_weights}).eval()


def plain_state(state: Any, where: str) -> StateDict:
    """Checks that `state` is a state dict of finite floating-point weights; removes the prefixes of a wrapped model.

    Args:
        state: value from a checkpoint.
        where: its key in the checkpoint, for error messages.

    Raises:
        ValueError: `state` is no state dict, or holds other values.
    """
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and torch.is_tensor(state[name]) for name in state
    ):
        raise ValueError(f"{where} is no state dict that maps names to tensors.")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "NaN or infinite values" if tensor.is_floating_point() else str(tensor.dtype)
            raise ValueError(f"{where}: {name} holds {what}; finite floating-point weights are needed.")
    return unwrapped(state)


def check_layers(state: StateDict, prefix: str, count: int, where: str) -> None:
    """Raises ValueError if a state dict has fewer than `count` layers, before a model of so many layers is built."""
    layers = {name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)}
    if count > len(layers):
        raise ValueError(f"{where} lacks layers: it has {len(layers)}, but model_args.num_hidden_layers is {count}.")


def unwrapped(state: StateDict) -> StateDict:
    """Removes the prefixes `module.` and `_orig_mod.` of a wrapped model from the names of weights.

    Raises:
        ValueError: two weights have the same name without prefixes.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"The weights hold {twice[0]!r} twice, under different prefixes of a wrapped model; keep one of them."
        )
    return {names[name]: tensor for name, tensor in state.items()}


def vae_state(state: StateDict, shape: dict[str, Any]) -> StateDict:
    """Converts documented VAE weights: removes prefixes, rotary tables and copies of the embedding, adds the tied `lm_head`.

    Raises:
        ValueError: the copies differ from the embedding.
    """
    state = drop_rotary(plain_state(state, "vae_model_state_dict"), shape)
    embedding = state.get("embed_tokens.weight", state.get("encoder.embed_tokens.weight"))
    if embedding is None:
        raise ValueError("vae_model_state_dict has no embed_tokens.weight; is this a TokCom checkpoint?")
    if embedding.dim() != 2:
        raise ValueError(f"embed_tokens.weight must be (tokens, hidden), got {tuple(embedding.shape)}.")
    for name in COPIES_OF_EMBEDDING:
        copy = state.pop(name, embedding)
        if copy is not embedding and not torch.equal(copy, embedding):
            raise ValueError(f"{name} differs from embed_tokens.weight, but in TokCom the two are one tied tensor.")
    return state | {"embed_tokens.weight": embedding, "lm_head.weight": embedding}


def drop_rotary(state: StateDict, shape: dict[str, Any]) -> StateDict:
    """Removes the stored rotary tables, after checking that this package's layers compute the same ones.

    Raises:
        ValueError: the tables have another base or another order of dimensions, so the model's outputs would differ.
    """
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    checked: set[str] = set()
    for name, table in state.items():
        kind = name.rpartition(ROTARY)[2]
        if ROTARY not in name or kind in checked:
            continue
        checked.add(kind)
        table = table.float().reshape(-1, table.shape[-1])
        cos, sin = rotary_embeddings(len(table), SimpleNamespace(**shape), table)
        frequencies = float(shape["rope_theta"]) ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        expected = {"cos_cached": cos[0], "sin_cached": sin[0], "inv_freq": frequencies.unsqueeze(0)}.get(kind)
        # Tables of half the width are accepted, because both halves of our tables are equal.
        if expected is not None and kind != "inv_freq":
            expected = expected[:, : table.shape[-1]]
        if expected is not None and (expected.shape != table.shape or (expected - table).abs().max() > 1e-3):
            raise ValueError(
                f"{name} is not the rotary table of rope_theta={shape['rope_theta']:g} in half-and-half order; this "
                "checkpoint was written by another architecture."
            )
    return {name: tensor for name, tensor in state.items() if ROTARY not in name}


def fill(build: Callable[[], Any], parts: dict[str, StateDict]) -> Any:
    """Builds a model and loads its weights.

    Args:
        build: function that returns the model.
        parts: submodule ("" for the model itself) -> its state dict.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape.
    """
    # On the meta device first, without memory: model_args may state larger sizes than the weights have.
    try:
        with torch.device("meta"):
            sketch = build()
    except RuntimeError as error:
        raise ValueError(f"no model of the sizes in model_args can be built ({str(error).splitlines()[0]}).") from None
    for part, state in parts.items():
        check_fit(sketch.get_submodule(part).state_dict(), state, STATE_OF[part])
    model = build()
    for part, state in parts.items():
        model.get_submodule(part).load_state_dict(state)
    return model


def check_fit(own: StateDict, state: StateDict, where: str) -> None:
    """Raises ValueError unless `state` has exactly the names and shapes of the weights `own`."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    for names, what in ((missing, "lacks"), (unexpected, "has the unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {what} {', '.join(names[:3])}{more}; it does not fit its model_args.")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but model_args require {tuple(own[name].shape)}."
            )
