"""Loads a model by folder or name so that whatever is wrong with the folder is one sentence that names it.

A folder is checked before transformers opens it: what its files announce (layers, widths, bytes of tensors) is compared with
what they hold, and a name that looks like a path is never looked up on the Hub.
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

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING

from .data.text_files import read_text

# What the largest published models have is below these by a factor of ten and more.
MOST_LAYERS = 10_000
MOST_SIZE = 1 << 28
LONGEST_HEADER = 100 << 20
SIZES = re.compile(r"(size|dim|width|channels|heads|vocab|chunks|factor|experts|positions|steps|tokens|groups)")
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf")
# What transformers, torch and huggingface_hub raise on files that they cannot use, beyond what they promise.
BROKEN = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, EOFError, RecursionError,
    UnpicklingError, SafetensorError, StrictDataclassError, struct.error,
)  # fmt: skip


def load_pretrained(loader: Any, name: str | os.PathLike, what: str = "Model", **options: Any) -> Any:
    """`loader.from_pretrained(name)`.

    Args:
        loader: a class of this package, or an auto class.
        name: folder or name on the Hub.
        what: is loaded, for the error.
        options: of `from_pretrained`.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder.
        ValueError: what `check_model_folder` refuses, or what the loader cannot use.
        OSError: it cannot be loaded from the Hub.
    """
    with checked_folder(name, what):
        return loader.from_pretrained(name, **options)


@contextmanager
def checked_folder(name: str | os.PathLike, what: str = "Model") -> Iterator[None]:
    """Checks a folder, then turns what a loader in the block raises about it into one sentence.

    Args:
        name: folder or name on the Hub.
        what: is loaded, for the error.

    Raises:
        FileNotFoundError, ValueError, OSError: as of `load_pretrained`.
    """
    check_model_folder(name)
    try:
        yield
    except BROKEN as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{what} {str(name)!r} cannot be loaded: {reason}") from None


def check_model_folder(name: str | os.PathLike) -> None:
    """Checks the configuration and the weights of a folder without loading them; a name on the Hub is not checked.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder.
        ValueError: no configuration that can be read, sizes beyond what any model has, weights that are cut short or
            announce more than they hold, or an index of other files than those in the folder.
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
            raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is no model that is known here.")
        _check_sizes(config, folder / "config.json")
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    for path in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(path)


def looks_like_a_path(name: str) -> bool:
    """Whether a name can only be meant as a path: names on the Hub are `name` or `owner/name`."""
    parent, _, last = name.rpartition("/")
    written = name.startswith((".", "~", "/")) or "\\" in name or "/" in parent or not last or name.endswith(FILES)
    return written or (bool(parent) and (parent == "outputs" or os.path.isdir(parent)))


def check_safetensors(path: str | Path) -> None:
    """Compares the header of a safetensors file with its length, before memory is asked for.

    Raises:
        ValueError: a file that is cut short, has bytes behind its tensors, or announces tensors that it does not hold.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header should be {length:,} bytes long, and {size:,} "
                "bytes are there."
            )
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header lists no tensors and places."
            ) from None
    end = 8 + length + max(ends, default=0)
    if size != end:
        raise ValueError(
            f"{path} is truncated or no safetensors file: its tensors should end at byte {end:,}, and the file has {size:,}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = str(error) if str(path) in str(error) else f"{path} is no JSON that can be read ({error})."
        raise ValueError(reason) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object with names and values.")
    return value


def _check_sizes(config: dict[str, Any], place: Path, inside: str = "") -> None:
    """Raises ValueError where a number of layers or a width is beyond what any model has."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, place, f"{inside}{name}.")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        counted = "layers" in name or "blocks" in name or "depth" in name
        most = MOST_LAYERS if counted else MOST_SIZE if SIZES.search(name) else None
        if most is not None and value > most:
            raise ValueError(f"{place}: {inside}{name} is {value:,}, more than any model has ({most:,} at most here).")


def _check_index(path: Path) -> None:
    parts = _read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{path} has no weight_map from names of tensors to names of files.")
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not (path.parent / part).is_file():
            raise ValueError(f"{path} names the file {part!r}, which is not beside it; copy all parts of the model.")
