"""Loads a model by folder or Hub name; any fault of the folder becomes one sentence that names the folder.

A folder is checked before transformers opens it: sizes in its configuration must be plausible, and the headers of its
weights must match the lengths of the files. A name that looks like a path is never looked up on the Hub.
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig

from .data.text_files import read_text

# At least ten times the sizes of the largest published models.
MOST_LAYERS = 10_000
MOST_SIZE = 1 << 28
LONGEST_HEADER = 100 << 20
SIZES = re.compile(r"(size|dim|width|channels|heads|vocab|chunks|factor|experts|positions|steps|tokens|groups)")
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf")
# Errors that transformers, torch and huggingface_hub raise for unusable files, including undocumented ones.
BROKEN = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, EOFError, RecursionError,
    UnpicklingError, SafetensorError, StrictDataclassError, struct.error,
)  # fmt: skip


def load_pretrained(loader: Any, name: str | os.PathLike, what: str = "Model", **options: Any) -> Any:
    """Returns `loader.from_pretrained(name, **options)`, after `check_model_folder`.

    Args:
        loader: a class of this package, or an Auto class.
        name: folder or Hub name.
        what: kind of object that is loaded, for error messages.
        options: further arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder.
        ValueError: `check_model_folder` refuses the folder, or the loader cannot use it.
        OSError: a file cannot be read, or the model cannot be loaded from the Hub.
    """
    with checked_folder(name, what):
        return loader.from_pretrained(name, **options)


@contextmanager
def checked_folder(name: str | os.PathLike, what: str = "Model") -> Iterator[None]:
    """Checks a model folder, then turns an error that a loader raises inside the block into one sentence.

    Args:
        name: folder or name on the Hub.
        what: kind of object that is loaded, for error messages.

    Raises:
        FileNotFoundError, ValueError, OSError: see `load_pretrained`.
    """
    check_model_folder(name)
    try:
        yield
    except BROKEN as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{what} {str(name)!r} cannot be loaded: {reason}") from None


def check_model_folder(name: str | os.PathLike, weights: bool = False) -> None:
    """Checks the configuration and the weights of a folder without loading them; a name on the Hub is not checked.

    Args:
        name: folder or name on the Hub.
        weights: whether the folder must hold weights, not a configuration alone.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder; or there are no weights in it.
        NotADirectoryError: `name` is a file.
        ValueError: the configuration cannot be read or has implausible sizes, weights are truncated or do not match their
            header, or an index names files that are not in the folder.
    """
    folder = Path(name)
    if "\0" in str(name) or not str(name).strip():
        raise FileNotFoundError(f"Model {str(name)!r} cannot be loaded: there is no such folder.")
    if folder.is_file():
        raise NotADirectoryError(f"Model folder {str(name)!r} is a file; name the folder that holds it.")
    if not folder.is_dir():
        if looks_like_a_path(str(name)):
            raise FileNotFoundError(f"Model {str(name)!r} cannot be loaded: there is no such folder.")
        return
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        kind = config.get("model_type")
        if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and "auto_map" not in config):
            raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is not known here.")
        _check_sizes(config, folder / "config.json")
    kept = sorted(folder.glob("*.safetensors"))
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    for path in kept:
        check_safetensors(path)
    for path in pickled if not kept else ():
        _check_pickled(path)
    if weights and not kept and not pickled:
        raise FileNotFoundError(f"{folder} holds no weights: no *.safetensors and no pytorch_model*.bin.")
    for path in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(path)


def check_base(name: str | os.PathLike) -> Any:
    """Checks a folder that must hold a model with its weights, without loading them; returns its configuration.

    Raises:
        FileNotFoundError, ValueError, OSError: as of `check_model_folder` and `load_pretrained`.
    """
    check_model_folder(name, weights=True)
    return load_pretrained(AutoConfig, name)


def looks_like_a_path(name: str) -> bool:
    """Returns whether a name can only be a path, because Hub names have the form `name` or `owner/name`."""
    parent, _, last = name.rpartition("/")
    written = name.startswith((".", "~", "/")) or "\\" in name or "/" in parent or not last or name.endswith(FILES)
    return written or (bool(parent) and (parent == "outputs" or os.path.isdir(parent)))


def check_safetensors(path: str | Path) -> None:
    """Compares the header of a safetensors file with the file's length, before any memory is allocated for it.

    Raises:
        ValueError: the file is truncated, has bytes after its tensors, or its header lists tensors that it does not hold.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header should have {length:,} bytes, but the file "
                f"has {size:,}."
            )
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header does not list tensors and their offsets."
            ) from None
    end = 8 + length + max(ends, default=0)
    if size != end:
        raise ValueError(
            f"{path} is truncated or no safetensors file: its tensors should end at byte {end:,}, but it has {size:,}."
        )
    try:
        with safe_open(path, "pt"):  # types, shapes and places; reads no tensor
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}.") from None


def _check_pickled(path: Path) -> None:
    """Raises ValueError where torch cannot read a file, or where it holds more than tensors; reads no tensor."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} is truncated or holds more than tensors, such as code; it is not opened.") from None
    except BROKEN as error:
        raise ValueError(
            f"{path} is no file of tensors that can be read: {' '.join(str(error).split())[:200]}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = str(error) if str(path) in str(error) else f"{path} is not valid JSON ({error})."
        raise ValueError(reason) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object with names and values.")
    return value


def _check_sizes(config: dict[str, Any], place: Path, inside: str = "") -> None:
    """Raises ValueError if a number of layers or a width is implausibly large."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, place, f"{inside}{name}.")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        counted = "layers" in name or "blocks" in name or "depth" in name
        most = MOST_LAYERS if counted else MOST_SIZE if SIZES.search(name) else None
        if most is not None and value > most:
            raise ValueError(
                f"{place}: {inside}{name} is {value:,}, more than any model has; at most {most:,} is accepted."
            )


def _check_index(path: Path) -> None:
    parts = _read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{path} has no weight_map from tensor names to file names.")
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not (path.parent / part).is_file():
            raise ValueError(f"{path} names the file {part!r}, which is not beside it; copy all parts of the model.")
