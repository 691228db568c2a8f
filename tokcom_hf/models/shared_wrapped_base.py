"""Files of models around a base model: finding the base, comparing it with its reference, reading and checking weights."""

import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .shared_strict_loading import opened

logger = logging.get_logger(__name__)
# Keywords of `from_pretrained` in two groups: access to the Hub, and how weights are loaded.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
LOADING_OPTIONS = (
    "dtype", "device_map", "attn_implementation", "experts_implementation", "quantization_config", "low_cpu_mem_usage",
    "max_memory", "offload_folder", "offload_buffers",
)  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


def locate_base(reference: str, name: str | os.PathLike | None) -> tuple[str, str | None]:
    """Where the base of a saved model is: `(Hub name or folder, None)`, or `(name, subfolder)` for `./subfolder`.

    Args:
        reference: name of the base in the config of the saved model.
        name: the saved model; None where a configuration and a state dict are given instead of a folder.

    Raises:
        ValueError: the reference leads out of the folder, is the saved model itself, or is neither a Hub name, an absolute
            path nor `./subfolder`.
    """
    parts = PurePosixPath(reference.replace("\\", "/")).parts
    if ".." in parts:
        raise ValueError(
            f"The base model {reference!r} of {name} lies outside its folder. A base is named by its Hub name, an "
            "absolute path or ./subfolder."
        )
    own = None if name is None else os.path.realpath(name)
    if not parts or reference == str(name) or os.path.realpath(reference) == own:
        raise ValueError(f"{name} names itself as its base model ({reference!r}); it must name another model.")
    if reference.startswith("./"):
        if name is None:
            raise ValueError(f"The base model {reference!r} is inside a folder; name that folder to from_pretrained.")
        return str(name), "/".join(parts)
    if not os.path.isabs(reference):
        try:
            validate_repo_id(reference)
        except HFValidationError as error:
            raise ValueError(
                f"The base model {reference!r} of {name} is neither a Hub name nor an absolute path: {error}"
            ) from error
    return reference, None


@contextmanager
def base_named(reference: str, name: str | os.PathLike | None) -> Iterator[None]:
    """Within this context an OSError also says that it concerns the base model `reference` of the saved model `name`."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The base model {reference!r} that {name} refers to cannot be loaded ({error}). If it moved, set "
            "base_model_name_or_path in config.json, or save with include_base=True."
        ) from error


def nothing_wrong() -> dict[str, Any]:
    """The loading info of `output_loading_info=True` for weights that all fit; anything else has raised an error before."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def matches_reference(weights: Mapping[str, torch.Tensor], load: Callable[[], nn.Module]) -> bool:
    """Whether a base model's weights are bit for bit those of its reference.

    The reference is loaded anew, because weights may have changed before the base was wrapped. Unmerged LoRA matrices are
    not compared, because they are saved beside the base. Offloaded weights (on the meta device) come from the files of the
    reference and count as equal.

    Args:
        weights: state dict of the base model.
        load: loads the reference in the dtype of the base.

    Returns:
        Whether they are equal; False if the reference cannot be loaded, so that the base itself is saved.
    """
    try:
        expected = load().state_dict()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        logger.warning(f"The base model's reference cannot be loaded, so the base itself is saved ({error}).")
        return False
    found = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    return found.keys() == expected.keys() and all(_equal(value, expected[name]) for name, value in found.items())


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.is_meta:
        return found.shape == expected.shape
    same_kind = found.dtype == expected.dtype and found.shape == expected.shape
    return same_kind and torch.equal(found.detach().to(expected.device), expected)


def check_generation_config(generation_config) -> None:
    """Raises TypeError for anything but a `GenerationConfig` or None."""
    if not isinstance(generation_config, GenerationConfig | None):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}.")


def named_as_dtype(options: dict) -> dict:
    """Options of `from_pretrained` in which the former name `torch_dtype` is replaced by `dtype`."""
    options = dict(options)
    older = options.pop("torch_dtype", None)
    if older is not None and options.get("dtype") is None:
        options["dtype"] = older
    return options


def grouped(options: dict[str, Any], *groups: Collection[str]) -> list[dict[str, Any]]:
    """One dictionary of options for each group of names, and a last one with the options of no group."""
    rest = {name: value for name, value in options.items() if not any(name in group for group in groups)}
    return [*({name: value for name, value in options.items() if name in group} for group in groups), rest]


def load_generation_config(model, name: str | os.PathLike | None, given: GenerationConfig | None, **hub) -> None:
    """Sets the generation config of `model` to `given`, or to the one saved at `name`; without both it stays the base's."""
    if given is not None:
        model.generation_config = given
    elif name is not None:
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)


def check_saving_options(options: dict) -> None:
    """Refuses keywords that `save_pretrained` of transformers would ignore.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: `safe_serialization` is False.
    """
    known = {"commit_message", "create_pr", "private", "repo_id"}
    # Keywords of older versions of transformers, which could also write other files than safetensors.
    known |= {"safe_serialization", "save_function"}
    known |= set(inspect.signature(PreTrainedModel.save_pretrained).parameters)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"save_pretrained does not take {', '.join(map(repr, unknown))}.")
    if options.get("safe_serialization") is False:
        raise ValueError("Models are saved as safetensors files only; leave safe_serialization out.")


def weight_files(name: str | os.PathLike, variant: str | None = None, **hub) -> list[str]:
    """Paths of the safetensors files of a saved model, its shards or the one file.

    Args:
        name: Hub name or folder.
        variant: as given to `save_pretrained`.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, ...

    Raises:
        OSError: there are no weight files, or a shard is missing.
    """
    middle = "" if variant is None else f".{variant}"
    single, index = f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"
    path = cached_file(name, single, _raise_exceptions_for_missing_entries=False, **hub)
    if path is not None:
        return [path]
    path = cached_file(name, index, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise OSError(f"{name} has no weights: neither {single} nor {index} is there.")
    shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
    # `cached_file` raises OSError for a missing shard.
    return [str(cached_file(name, shard, **hub)) for shard in sorted(set(shards))]


def read_weights(name: str | os.PathLike, variant: str | None = None, **hub) -> dict[str, torch.Tensor]:
    """The weights of a saved model by name, on the CPU; arguments and errors as for `weight_files`."""
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(name, variant, **hub):
        with opened(path) as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    return weights


def stored_dtypes(files: list[str]) -> dict[str, torch.dtype]:
    """The dtype of every weight in safetensors files, read from their headers."""
    dtypes = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                dtypes[name] = _DTYPES.get(file.get_slice(name).get_dtype(), torch.uint8)
    return dtypes


def remove_weights(folder: str | os.PathLike, variant: str | None = None) -> None:
    """Deletes the weight files of an earlier save: transformers would read a single old file rather than newer shards."""
    middle = "" if variant is None else f".{variant}"
    for name in (f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"):
        Path(folder, name).unlink(missing_ok=True)


def check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuses weights that do not fit the model.

    Args:
        weights: weights that were read, by name.
        expected: state dict of the model.
        where: name of the file, for the error.

    Raises:
        ValueError: a weight is missing, unexpected, of another shape or kind of number, or holds NaN or infinity.
    """
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{where} does not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    for name, value in weights.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise ValueError(
                f"{name} in {where} has shape {tuple(value.shape)}; its config asks for {tuple(wanted.shape)}."
            )
        if value.is_floating_point() != wanted.is_floating_point():
            raise ValueError(
                f"{name} in {where} is stored as {value.dtype}, which cannot be its {wanted.dtype} weight."
            )
        check_finite(name, value, where)


def check_finite(name: str, value: torch.Tensor, where: str) -> None:
    """Raises ValueError where the weight `name` holds NaN or infinity."""
    if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} in {where} holds NaN or infinite numbers: the checkpoint is damaged or diverged.")


@contextmanager
def computed_buffers_kept(base: nn.Module) -> Iterator[None]:
    """Within this context a cast of `base` leaves its non-persistent buffers in their dtype, as loading in that dtype does.

    `.to(torch.bfloat16)` would round the frequencies of RoPE, which no file holds: after saving and loading, the model would
    differ from the one that was cast.
    """
    kept = [
        (module, name, module._buffers[name])
        for module in base.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    yield
    for module, name, before in kept:
        now = module._buffers[name]
        if now.dtype != before.dtype:
            module._buffers[name] = before.to(now.device)
