"""Saving and loading `PrunedVLM`: the heads, and the base model by reference or in a subfolder."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

from .configuration_pruned_vlm import PrunedVLMConfig

INCLUDED = "base"
_BASE_ONLY = ("dtype", "device_map", "attn_implementation", "quantization_config", "low_cpu_mem_usage", "max_memory")
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def save_pruned_vlm(model, save, folder, include_base: bool, state_dict=None, **kwargs) -> None:
    """Writes config, heads and trained base weights; the whole base on request, or where nothing else could find it.

    Args:
        model: the `PrunedVLM`.
        save: `PreTrainedModel.save_pretrained`, bound to the model.
        folder: target folder.
        include_base: save the base in the subfolder `base`.
        state_dict: weights to save instead of the model's own (distributed training gives them).
    """
    config = model.config
    reference = config.base_model_name_or_path
    include_base = include_base or reference is None
    weights = model.state_dict() if state_dict is None else state_dict
    # Adapters that are still being trained belong to the checkpoint; `merge_lora` makes them part of the base.
    kept = {name: value for name, value in weights.items() if not name.startswith("base.") or ".lora_" in name}
    if not kept:
        # Safetensors needs at least one tensor; a training-free strategy has none.
        kept = {"no_heads": torch.zeros(1)}
    if include_base:
        config.base_model_name_or_path = INCLUDED
    elif os.path.isdir(reference):
        config.base_model_name_or_path = os.path.abspath(reference)
    try:
        # Names stay as they are: the renaming some VLMs do on saving would not be undone for a part of the weights.
        save(folder, state_dict=kept, **kwargs | {"save_original_format": False})
    finally:
        config.base_model_name_or_path = reference
    main = kwargs.get("is_main_process", True)
    if main:
        _add_auto_class(Path(folder) / "config.json")
    if include_base and main:
        inner = {n.removeprefix("base."): v for n, v in weights.items() if n.startswith("base.")}
        model.base.save_pretrained(Path(folder) / INCLUDED, state_dict=inner)


def _add_auto_class(path: Path) -> None:
    """Remote code is announced for one Auto class only; this model answers to a second one."""
    values = json.loads(path.read_text(encoding="utf-8"))
    classes = values.get("auto_map", {})
    if "AutoModel" in classes:
        classes["AutoModelForImageTextToText"] = classes["AutoModel"]
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_pruned_vlm(cls, name, config=None, state_dict=None, **kwargs):
    """Loads the base model, builds `cls` around it and fills the heads.

    Raises:
        OSError: the folder, its weights or the base model cannot be found.
        ValueError: a head's weights are missing from the file.
    """
    hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
    loading = {key: kwargs.pop(key) for key in _BASE_ONLY if key in kwargs}
    if not isinstance(config, PrunedVLMConfig):
        config = PrunedVLMConfig.from_pretrained(name, **hub)
    path = cached_file(name, "model.safetensors", **hub)
    reference = config.base_model_name_or_path
    if reference is None:
        raise OSError(f"{name} names no base model; build PrunedVLM with from_base and save it again.")
    if reference == INCLUDED:
        inner = hub | {"subfolder": "/".join(filter(None, [hub.get("subfolder"), INCLUDED]))}
        base = AutoModelForImageTextToText.from_pretrained(name, **inner, **loading)
    else:
        try:
            base = AutoModelForImageTextToText.from_pretrained(reference, **loading)
        except OSError as error:
            raise OSError(
                f"The base model {reference!r} that {name} refers to cannot be loaded ({error}). If it moved, set "
                "config.base_model_name_or_path, or save with include_base=True."
            ) from error
    model = cls(config, base=base)
    weights = load_file(path) if state_dict is None else state_dict
    weights.pop("no_heads", None)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.startswith("base.")]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    for head in (model.token_merger, model.layer_pruner):
        if head is not None:
            head.to(device=base.device, dtype=base.dtype)
    model.config.name_or_path = str(name)
    return model.eval()
