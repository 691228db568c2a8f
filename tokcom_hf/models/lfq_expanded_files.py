"""Saving and loading `LFQExpandedModel`: the new rows with a reference to the base model, or everything."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from .configuration_lfq_expanded import LFQExpandedConfig
from .lfq_rows import device_of, vocabulary_of

ROWS = "lfq_rows."
_BASE_ONLY = (
    "dtype",
    "device_map",
    "attn_implementation",
    "quantization_config",
    "low_cpu_mem_usage",
    "max_memory",
    "trust_remote_code",
)
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def save_lfq_expanded(model, save, folder, include_base: bool | None, state_dict=None, **kwargs) -> None:
    """Writes the configuration and the new rows, and the base model's weights where `include_base` says so.

    Args:
        model: the `LFQExpandedModel`.
        save: `PreTrainedModel.save_pretrained`, bound to the model.
        folder: target folder.
        include_base: None decides as `LFQExpandedModel.save_pretrained` documents.
        state_dict: weights to save instead of the model's own (distributed training gives them).

    Raises:
        ValueError: the base model has to be included, but only its own remote code can build it.
    """
    config = model.config
    reference = config.base_model_name_or_path
    if include_base is None:
        include_base = reference is None or any(p.requires_grad for p in model.base.parameters())
    if not include_base and reference is None:
        raise ValueError(
            "include_base=False needs a base model that was loaded by name or from a folder; this one was built in "
            "memory. Save it first and load it, or save everything."
        )
    if include_base and config.base_config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"The base model's code ({config.base_config['model_type']!r}) is not part of transformers, so it cannot be "
            "stored in this folder: use include_base=False, or merge_and_unload() and save that."
        )
    weights = model.state_dict() if state_dict is None else state_dict
    if not include_base:
        weights = {name: value for name, value in weights.items() if name.startswith(ROWS)}
        if os.path.isdir(reference):
            config.base_model_name_or_path = _reference(reference, folder)
    config.base_included = include_base
    try:
        # Names stay as they are: the renaming some VLMs do on saving is not undone below a prefix.
        save(folder, state_dict=weights, **kwargs | {"save_original_format": False})
    finally:
        config.base_model_name_or_path = reference
    if kwargs.get("is_main_process", True):
        _add_auto_class(Path(folder) / "config.json", config.base_auto_class)


def _reference(base: str, folder) -> str:
    """Where a base model's folder is: below the folder saved to (`./base`, which moves along), or its absolute path."""
    base, folder = os.path.abspath(base), os.path.abspath(folder)
    return f"./{os.path.relpath(base, folder)}" if base.startswith(folder + os.sep) else base


def _add_auto_class(path: Path, auto_class: str) -> None:
    """Remote code is announced for one Auto class only; this model also answers to its base model's."""
    values = json.loads(path.read_text(encoding="utf-8"))
    classes = values.get("auto_map", {})
    if "AutoModel" in classes:
        classes[auto_class] = classes["AutoModel"]
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_lfq_expanded(cls, load, name, *args, config=None, **kwargs):
    """Loads everything from the folder, or the base model from where the configuration says and the new rows.

    Args:
        cls: `LFQExpandedModel`.
        load: `PreTrainedModel.from_pretrained`, bound to it.
        name: Hub name or folder.

    Raises:
        OSError: the folder, its weights or the base model cannot be found.
        ValueError: the weights do not fit the configuration or the base model.
    """
    hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
    if not isinstance(config, LFQExpandedConfig):
        config = LFQExpandedConfig.from_pretrained(name, **hub)
    if config.base_config is None:
        raise ValueError(
            f"{name} is no LFQ checkpoint: its config.json has no base_config. To add LFQ tokens to a model use "
            "LFQExpandedModel.from_base."
        )
    if config.base_included:
        wanted = kwargs.pop("output_loading_info", False)
        try:
            model, info = load(name, *args, config=config, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"The weights of {name} do not fit its config.json: {error}") from error
        if info["missing_keys"]:
            raise ValueError(f"{name} lacks weights its config.json asks for: {sorted(info['missing_keys'])[:3]}.")
        return (model, info) if wanted else model
    return _load_rows(cls, name, config, hub, kwargs)


def _load_rows(cls, name, config, hub: dict, kwargs: dict):
    reference = config.base_model_name_or_path
    loading = {key: kwargs[key] for key in _BASE_ONLY if key in kwargs}
    try:
        if reference.startswith("./"):
            base = config.base_class().from_pretrained(name, subfolder=reference[2:], **hub | loading)
        else:
            base = config.base_class().from_pretrained(reference, **loading)
    except OSError as error:
        raise OSError(
            f"The base model {reference!r} that {name} refers to cannot be loaded ({error}). If it moved, set "
            "base_model_name_or_path in config.json, or save with include_base=True."
        ) from error
    path = cached_file(name, "model.safetensors", **hub)
    weights = load_file(path) if kwargs.get("state_dict") is None else kwargs["state_dict"]
    weights = {key.removeprefix(ROWS): value for key, value in weights.items()}
    model = cls(config, base=base)
    expected = {key: value.shape for key, value in model.lfq_rows.state_dict().items()}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        raise ValueError(
            f"The LFQ rows in {path} do not fit output_dim={config.output_dim} and base model {reference!r}: expected "
            f"{_shapes(expected)}, got {_shapes(found)}."
        )
    model.lfq_rows.load_state_dict(weights)
    rows_dtype = kwargs.get("dtype")
    model.lfq_rows.to(device=device_of(vocabulary_of(base)[0]))
    if isinstance(rows_dtype, torch.dtype):
        model.lfq_rows.to(rows_dtype)
    model.config.name_or_path = str(name)
    return model.eval()


def _shapes(shapes: dict) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))


def auto_class_of(model: PreTrainedModel) -> str:
    """Name of the Auto class that builds a model of this class."""
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if auto_class._model_mapping.get(type(model.config), None) is type(model):
            return auto_class.__name__
    return "AutoModel"


def load_base(name: str, **kwargs) -> PreTrainedModel:
    """A causal or image-text-to-text model by name, whichever its configuration asks for."""
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise OSError(f"No such model folder: {name!r}.")
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **hub)
    both = AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if type(config) in both else AutoModelForCausalLM
    return auto_class.from_pretrained(name, **kwargs)
