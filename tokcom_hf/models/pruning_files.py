"""Saves and loads a `PrunedVLM`: its heads, and its base by reference, in a subfolder or in the same weight files."""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import HfApi

from .configuration_pruned_vlm import PrunedVLMConfig
from .pruning_building import load_base
from .shared_wrapped_base import (
    HUB_OPTIONS,
    LOADING_OPTIONS,
    base_named,
    check_finite,
    check_saving_options,
    check_weights,
    grouped,
    load_generation_config,
    locate_base,
    matches_reference,
    named_as_dtype,
    nothing_wrong,
    read_weights,
    remove_weights,
    stored_dtypes,
    weight_files,
)

INCLUDED = "base"
# Keywords of `from_pretrained` that concern the saved folder itself.
_OF_FOLDER = ("generation_config", "output_loading_info", "use_safetensors", "variant", "subfolder")
# Keywords that AutoModel hands on; they concern the code, which is loaded already.
_OF_AUTO = ("trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")


# ---------------------------------------------------------------------- saving
def save_pruned_vlm(model, save, folder, include_base: bool | None, state_dict=None, **kwargs) -> None:
    """Writes the configuration, the heads, and the base where its reference does not give its weights.

    Args:
        model: the `PrunedVLM`.
        save: `PreTrainedModel.save_pretrained`, bound to the model.
        folder: target folder.
        include_base: as `PrunedVLM.save_pretrained` documents.
        state_dict: weights to save instead of the model's own (distributed training gives them).

    Raises:
        ValueError: `include_base=False`, but the base is not what its reference gives.
    """
    check_saving_options(kwargs)
    if kwargs.get("distributed_checkpoint"):
        raise ValueError("PrunedVLM is saved as safetensors files; leave distributed_checkpoint out.")
    push, kwargs = grouped(kwargs, ("push_to_hub", "repo_id", "commit_message", "create_pr", "private"))
    weights = model.state_dict() if state_dict is None else state_dict
    if getattr(model, "_hf_peft_config_loaded", False):
        # A LoRA adapter added by `add_adapter` is saved alone, as in transformers.
        save(folder, state_dict=weights, **kwargs)
        return
    main = kwargs.get("is_main_process", True)
    inner = {name.removeprefix("base."): value for name, value in weights.items() if name.startswith("base.")}
    config = model.config
    config.base_config = model.base.config.to_dict()
    before = config.base_model_name_or_path, config.base_included
    reference, config.base_included = _base_to_write(model, inner, folder, include_base) if main else (None, True)
    config.base_model_name_or_path = reference
    kept = weights
    if not config.base_included:
        # Unmerged LoRA matrices belong to the checkpoint; merged ones are part of the base.
        kept = {name: value for name, value in weights.items() if not name.startswith("base.") or ".lora_" in name}
        # A weight file needs at least one tensor, and a model with a training-free strategy has none.
        kept = kept or {"no_heads": torch.zeros(1)}
    if main:
        remove_weights(folder, kwargs.get("variant"))
    try:
        # Some VLMs rename weights when they are saved; loading could not undo that for names that begin with `base.`.
        save(folder, state_dict=kept, **kwargs | {"save_original_format": False})
    finally:
        config.base_model_name_or_path, config.base_included = before
    if not main:
        return
    _add_auto_class(Path(folder) / "config.json")
    if reference == INCLUDED and include_base:
        options = {key: kwargs[key] for key in ("max_shard_size", "variant") if key in kwargs}
        plain = {name.replace(".base_layer.", "."): value for name, value in inner.items() if ".lora_" not in name}
        offloaded = any(value.is_meta for value in plain.values())
        remove_weights(Path(folder) / INCLUDED, kwargs.get("variant"))
        model.base.save_pretrained(Path(folder) / INCLUDED, state_dict=None if offloaded else plain, **options)
    if push.get("push_to_hub"):
        _push(folder, kwargs.get("token"), push)


def _base_to_write(model, inner: dict, folder, include_base: bool | None) -> tuple[str | None, bool]:
    """The base's reference in the saved configuration, and whether its weights are saved beside the heads'."""
    reference, revision = model.config.base_model_name_or_path, model.config.base_revision
    if include_base:
        return INCLUDED, False
    local = reference is not None and os.path.isdir(reference)
    target = os.path.realpath(folder)
    overwritten = local and os.path.realpath(reference) == target
    if reference not in (None, INCLUDED) and not overwritten:
        load = lambda: load_base(reference, revision=revision, dtype=model.base.dtype)  # noqa: E731
        if matches_reference(inner, load):
            if local and os.path.realpath(reference) == os.path.join(target, INCLUDED):
                return INCLUDED, False
            return os.path.abspath(reference) if local else reference, False
    if include_base is False:
        raise ValueError(
            "include_base=False, but the base model is not what its reference "
            f"{reference!r} gives: it was trained, merged, cast or built in memory. Leave include_base out."
        )
    return None if local or reference == INCLUDED else reference, True


def _add_auto_class(path: Path) -> None:
    """Names the saved code for AutoModelForImageTextToText, too; transformers names it for AutoModel alone."""
    values = json.loads(path.read_text(encoding="utf-8"))
    classes = values.get("auto_map", {})
    if "AutoModel" in classes:
        classes["AutoModelForImageTextToText"] = classes["AutoModel"]
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _push(folder, token, options: dict) -> None:
    """Uploads the finished folder with all of its files."""
    api, name = HfApi(token=token), options.get("repo_id") or Path(folder).name
    repo_id = api.create_repo(name, private=options.get("private"), exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=options.get("commit_message") or "Upload model",
        create_pr=options.get("create_pr"),
        ignore_patterns=["checkpoint-*/**"],
    )


# ---------------------------------------------------------------------- loading
def load_pruned_vlm(cls, load, name, config=None, state_dict=None, **kwargs):
    """Loads the base model, builds `cls` around it and fills the heads.

    Args:
        cls: `PrunedVLM`.
        load: `PreTrainedModel.from_pretrained`, bound to `cls`.
        name: Hub name or folder.
        config: configuration, or where to load one from, instead of the folder's own.
        state_dict: weights instead of the folder's own: of the heads, or of heads and base (names that begin with `base.`).
        kwargs: options of `from_pretrained`, and fields of `PrunedVLMConfig` that replace the folder's.

    Raises:
        OSError: the folder, its weights or the base model cannot be found.
        TypeError: a keyword is unknown.
        ValueError: weights do not fit, the base is no supported VLM, or its reference is not allowed.
    """
    groups = (_OF_AUTO, _OF_FOLDER, HUB_OPTIONS, (*LOADING_OPTIONS, "weights_only"))
    _, of_folder, hub, loading, fields = grouped(named_as_dtype(kwargs), *groups)
    if of_folder.get("use_safetensors") is False:
        raise ValueError("PrunedVLM is stored in safetensors files only; leave use_safetensors out.")
    variant, subfolder = of_folder.get("variant"), of_folder.get("subfolder") or ""
    if config is None or isinstance(config, str | os.PathLike):
        config = PrunedVLMConfig.from_pretrained(config or name, subfolder=subfolder, **hub)
    elif not isinstance(config, PrunedVLMConfig):
        # Remote code reads configurations with its own copy of the class.
        if config.model_type != PrunedVLMConfig.model_type:
            raise ValueError(f"PrunedVLM needs a PrunedVLMConfig, got {type(config).__name__}.")
        config = PrunedVLMConfig.from_dict(config.to_dict())
    unknown = sorted(key for key in fields if key not in PrunedVLMConfig.__annotations__)
    if unknown:
        raise TypeError(f"PrunedVLM.from_pretrained does not take {', '.join(map(repr, unknown))}.")
    if fields:
        config = PrunedVLMConfig.from_dict(config.to_dict() | fields)
    given = {} if variant is None else {"variant": variant}
    inside = {"subfolder": subfolder} | hub
    if state_dict is not None and any(key.startswith("base.") for key in state_dict):
        model = _load_everything(load, None, config, loading | {"state_dict": state_dict}, {}, [])
    elif config.base_included:
        model = _load_everything(load, name, config, inside | loading, given, weight_files(name, variant, **inside))
    else:
        base = _load_reference(name, config, hub, subfolder, loading, given)
        config._attn_implementation = base.config._attn_implementation
        model = cls(config, base=base)
        _fill_heads(model, name, read_weights(name, variant, **inside) if state_dict is None else state_dict)
    load_generation_config(model, name, of_folder.get("generation_config"), **inside)
    model.config.name_or_path = str(name or "")
    model.eval()
    return (model, nothing_wrong()) if of_folder.get("output_loading_info") else model


def _load_reference(name, config, hub: dict, subfolder: str, loading: dict, given: dict):
    """Loads the base model from where the configuration says, by default in the dtype of the saved model."""
    reference = config.base_model_name_or_path
    if reference is None:
        raise OSError(f"{name} names no base model; build PrunedVLM with from_base and save it again.")
    dtype = loading.get("dtype")
    if dtype in (None, "auto"):
        loading = loading | {"dtype": config.dtype or "auto"}
    where, inner = locate_base(f"./{INCLUDED}" if reference == INCLUDED else reference, name)
    with base_named(reference, name):
        if inner is not None:
            inner = "/".join(filter(None, [subfolder, inner]))
            return load_base(where, subfolder=inner, **hub, **loading, **given)
        return load_base(where, **hub | {"revision": config.base_revision}, **loading)


def _fill_heads(model, name, weights: dict) -> None:
    """Fills the heads with weights in their saved dtype, on the device of the base's embeddings."""
    weights = {key: value for key, value in weights.items() if key != "no_heads"}
    adapters = sorted(key for key in weights if ".lora_" in key)
    if adapters:
        raise ValueError(
            f"{name} is a training checkpoint with LoRA adapters ({adapters[0]}, ...): resume the training from it, or "
            "merge the adapters and save again."
        )
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("base.")}
    check_weights(weights, heads, str(name))
    if weights:
        model.load_state_dict(weights, strict=False, assign=True)
    for head in (model.token_merger, model.layer_pruner):
        if head is not None:
            head.to(device=model.head_device)


def _load_everything(load, name, config, options: dict, given: dict, files: list[str]):
    """Loads heads and base from one set of files."""
    dtypes = stored_dtypes(files)
    # Mismatches are let through here, because the error below names them; transformers' own only refers to its log.
    options = options | given | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(name, config=config, **options)
    problems = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
    shapes = sorted(info.get("mismatched_keys") or ())
    problems["mismatched_keys"] = [
        f"{key} ({tuple(stored)} stored, {tuple(wanted)} wanted)" for key, stored, wanted in shapes
    ]
    if any(problems.values()):
        found = ", ".join(f"{kind.replace('_keys', '')} {keys[:3]}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{name} does not fit its config: {found}.")
    for key, value in model.state_dict().items():
        stored = dtypes.get(key)
        if stored is not None and stored.is_floating_point != value.is_floating_point():
            raise ValueError(f"{key} in {name} is stored as {stored}, which cannot be its {value.dtype} weight.")
        check_finite(key, value, str(name))
    for head in ("token_merger", "layer_pruner"):
        kinds = {dtype for key, dtype in dtypes.items() if key.startswith(head)}
        if len(kinds) == 1 and getattr(model, head) is not None:
            getattr(model, head).to(kinds.pop())
    return model
