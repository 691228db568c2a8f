"""Saves and loads an `LFQExpandedModel`: the new rows with a reference to the base model, or with its weights."""

import os

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from .configuration_lfq_expanded import LFQExpandedConfig
from .lfq_building import auto_class_of, load_base, reference_of  # noqa: F401 (their former place)
from .lfq_rows import device_of, vocabulary_of
from .shared_strict_loading import check_values, opened
from .shared_wrapped_base import (
    HUB_OPTIONS,
    LOADING_OPTIONS,
    base_named,
    check_saving_options,
    grouped,
    load_generation_config,
    locate_base,
    matches_reference,
    named_as_dtype,
    nothing_wrong,
    read_weights,
    remove_weights,
    weight_files,
)

ROWS = "lfq_rows."
# Keywords of `from_pretrained` that concern the saved folder, and keywords that Auto classes and pipelines hand on.
_OTHER = (
    "variant",
    "state_dict",
    "output_loading_info",
    "use_safetensors",
    "weights_only",
    "adapter_kwargs",
    "generation_config",
)
_INTERNAL = ("trust_remote_code", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash")


def save_lfq_expanded(model, save, folder, include_base: bool | None, state_dict=None, **kwargs) -> None:
    """Writes the configuration and the new rows, and the base model's weights where `include_base` says so.

    Args:
        model, folder: the `LFQExpandedModel` and the target folder.
        save: the model's inherited `save_pretrained`.
        include_base: None decides as `LFQExpandedModel.save_pretrained` documents.
        state_dict: weights to save instead of the model's own (distributed training gives them).

    Raises:
        ValueError: a base model of remote code or with unmerged LoRA, which cannot be included; or
            `include_base=False` where the reference does not give these weights.
    """
    check_saving_options(kwargs)
    config = model.config
    reference = config.base_model_name_or_path
    weights = model.state_dict() if state_dict is None else state_dict
    base_weights = {name.removeprefix("base."): value for name, value in weights.items() if name.startswith("base.")}
    _refuse_adapters(model, base_weights)
    own = (
        reference is not None and os.path.isdir(reference) and os.path.realpath(reference) == os.path.realpath(folder)
    )
    if own and include_base is False:
        raise ValueError(
            f"{os.fspath(folder)} is the folder of the base model, which the new rows would replace; save them to another "
            "folder, or leave include_base out."
        )
    if include_base is None and own:
        # This save replaces the only files that the base model could be loaded from.
        include_base = True
    elif include_base is None:
        include_base = any(p.requires_grad for p in model.base.parameters()) or not _is_reference(model, base_weights)
    elif not include_base and reference is None:
        raise ValueError(
            "include_base=False needs a base model that was loaded by name or from a folder; this one was built in "
            "memory. Save it first and load it, or save everything."
        )
    elif not include_base and not _is_reference(model, base_weights):
        raise ValueError(
            f"include_base=False would lose weights: the base model is no longer what {reference!r} gives (it was "
            "trained, LoRA was merged into it, or it was cast). Leave include_base out, or save the base model first."
        )
    if include_base and config.base_config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"The base model's code ({config.base_config['model_type']!r}) is not part of transformers, so it cannot be "
            "stored in this folder: use include_base=False, or merge_and_unload() and save that."
        )
    if not include_base:
        weights = {name: value for name, value in weights.items() if name.startswith(ROWS)}
        if os.path.isdir(reference):
            config.base_model_name_or_path = _reference(reference, folder)
    config.base_included = include_base
    if kwargs.get("is_main_process", True) and not any(value.is_meta for value in weights.values()):
        # Files of an earlier save stay where offloaded weights are still read from them.
        remove_weights(folder, kwargs.get("variant"))
    try:
        # Some VLMs rename weights when they are saved; loading could not undo that for names that begin with `base.`.
        save(folder, state_dict=weights, **kwargs | {"save_original_format": False})
    finally:
        config.base_model_name_or_path = reference


def _refuse_adapters(model, base_weights: dict) -> None:
    adapters = [name for name in base_weights if ".lora_" in name or ".base_layer." in name]
    if adapters or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"This model has LoRA adapters that are not merged ({adapters[:1] or 'added with add_adapter'}), which its "
            "own files cannot hold. Save the PeftModel that get_peft_model(model, LoraConfig(..., modules_to_save="
            "['lfq_rows'])) gives, or merge the adapters first."
        )


def _is_reference(model, base_weights: dict) -> bool:
    """Whether the base model's weights equal those at `base_model_name_or_path`."""
    config, base = model.config, model.base
    if config.base_model_name_or_path is None:
        return False
    if getattr(base, "hf_quantizer", None) is not None:
        # Quantized weights do not train.
        return True
    # Remote code that runs now was trusted when the base model was loaded.
    trusted = type(base).__module__.startswith("transformers_modules")
    where = {"revision": config.base_revision, "trust_remote_code": trusted}
    return matches_reference(
        base_weights,
        lambda: config.base_class().from_pretrained(config.base_model_name_or_path, dtype=base.dtype, **where),
    )


def _reference(base: str, folder) -> str:
    """The reference to a base model's folder: `./base` where it is inside the folder saved to, else its absolute path."""
    base, folder = os.path.abspath(base), os.path.abspath(folder)
    return f"./{os.path.relpath(base, folder)}" if base.startswith(folder + os.sep) else base


def load_lfq_expanded(cls, load, name, *args, config=None, base_trust_remote_code: bool = False, **kwargs):
    """Loads the new rows, and the base model from the same folder or from where the configuration says.

    Args:
        cls, load: `LFQExpandedModel` and its inherited `from_pretrained`.
        name: Hub name or folder.
        base_trust_remote_code: whether code of the base model's repository may run; `trust_remote_code` concerns `name`.

    Raises:
        OSError: the folder, its weights or the base model cannot be found.
        TypeError: an unknown keyword.
        ValueError: weights that do not fit the configuration or the base model, or are not finite.
    """
    kwargs = named_as_dtype(kwargs)
    hub = {key: kwargs[key] for key in (*HUB_OPTIONS, "subfolder") if kwargs.get(key) is not None}
    if not isinstance(config, LFQExpandedConfig):
        known = (*LOADING_OPTIONS, *HUB_OPTIONS, "subfolder", *_OTHER, *_INTERNAL)
        kwargs, own = grouped(kwargs, known)
        config, unknown = LFQExpandedConfig.from_pretrained(name, return_unused_kwargs=True, **hub, **own)
        kwargs |= unknown
    if config.base_config is None:
        raise ValueError(
            f"{name} is no LFQ checkpoint: its config.json has no base_config. To add LFQ tokens to a model use "
            "LFQExpandedModel.from_base."
        )
    given = kwargs.get("state_dict")
    if not (config.base_included if given is None else any(not key.startswith(ROWS) for key in given)):
        return _load_rows(cls, name, config, hub, base_trust_remote_code, kwargs)
    if name is not None and kwargs.get("dtype") in (None, "auto") and _rows_are_float32(name, hub, kwargs):
        kwargs["rows_in_float32"] = True
    try:
        model, info = load(name, *args, config=config, **kwargs | {"output_loading_info": True})
    except RuntimeError as error:
        raise ValueError(f"The weights of {name} do not fit its config.json: {error}") from error
    for what, keys in (
        ("lacks weights its config.json asks for", "missing"),
        ("holds weights of no use", "unexpected"),
    ):
        if info[f"{keys}_keys"]:
            raise ValueError(f"{name} {what}: {sorted(info[f'{keys}_keys'])[:3]}.")
    return (model, info) if kwargs.get("output_loading_info") else model


def _rows_are_float32(name, hub: dict, kwargs: dict) -> bool:
    """Whether a checkpoint that includes its base stores the rows in float32."""
    for path in weight_files(name, kwargs.get("variant"), **hub):
        with opened(path) as file:
            if f"{ROWS}embedding" in file.keys():  # noqa: SIM118 (no iteration over the file itself)
                return file.get_slice(f"{ROWS}embedding").get_dtype() == "F32"
    return False


def _load_rows(cls, name, config, hub: dict, base_trust_remote_code: bool, kwargs: dict):
    unknown = [key for key in kwargs if key not in (*LOADING_OPTIONS, *HUB_OPTIONS, "subfolder", *_OTHER, *_INTERNAL)]
    if unknown:
        raise TypeError(f"LFQExpandedModel.from_pretrained got an unexpected keyword argument {unknown[0]!r}.")
    base = _load_base(name, config, hub, base_trust_remote_code, kwargs)
    weights = kwargs.get("state_dict")
    where = name
    if weights is None:
        weights = read_weights(name, kwargs.get("variant"), **hub)
    foreign = sorted(key for key in weights if not key.startswith(ROWS))
    if foreign:
        raise ValueError(f"{where} refers to its base model, but holds other weights than LFQ rows: {foreign[:3]}.")
    config._attn_implementation = base.config._attn_implementation
    model = cls(config, base=base)
    expected = {key: value.shape for key, value in model.lfq_rows.state_dict().items()}
    found = {key.removeprefix(ROWS): value.shape for key, value in weights.items()}
    if expected != found:
        raise ValueError(
            f"The LFQ rows in {where} do not fit output_dim={config.output_dim} and base model "
            f"{config.base_model_name_or_path!r}: expected {_shapes(expected)}, got {_shapes(found)}."
        )
    check_values(model, weights.items())
    dtype = kwargs.get("dtype")
    if dtype is None or dtype == "auto":
        dtype = next(iter(weights.values())).dtype
    model.lfq_rows.to(
        device=device_of(vocabulary_of(base)[0]), dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype
    )
    model.lfq_rows.load_state_dict({key.removeprefix(ROWS): value for key, value in weights.items()})
    load_generation_config(model, name, kwargs.get("generation_config"), **hub)
    model.config.name_or_path = str(name or "")
    return (model.eval(), nothing_wrong()) if kwargs.get("output_loading_info") else model.eval()


def _load_base(name, config, hub: dict, trusted: bool, kwargs: dict) -> PreTrainedModel:
    """The base model that the configuration of the saved model `name` refers to.

    A base model in a folder inside the saved one is named by its absolute path in the configuration afterwards.
    """
    reference = config.base_model_name_or_path
    where, subfolder = locate_base(reference, name)
    if subfolder is not None:
        where_options = hub | {"subfolder": "/".join(filter(None, (hub.get("subfolder"), subfolder)))}
    else:
        # `revision` names a commit of the saved model's repository, not of the base model's.
        where_options = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        where_options["revision"] = config.base_revision
    loading = {key: kwargs[key] for key in LOADING_OPTIONS if key in kwargs}
    if loading.get("dtype") in (None, "auto") and config.dtype is not None:
        loading["dtype"] = config.dtype
    with base_named(reference, name):
        _check_base(name, config, where, where_options, trusted)
        base = config.base_class().from_pretrained(where, trust_remote_code=trusted, **where_options, **loading)
    if subfolder is not None:
        # A base model in a subfolder on the Hub has no name of its own, so the next save includes its weights.
        folder = os.path.join(os.path.abspath(name), where_options["subfolder"])
        config.base_model_name_or_path = folder if os.path.isdir(folder) else None
    return base


def _check_base(name, config, where: str, where_options: dict, trusted: bool) -> None:
    """Raises ValueError for a base model of another type than the configuration says, or with code that is not trusted."""
    values, _ = LFQExpandedConfig.get_config_dict(where, **where_options)
    kind, wanted = values.get("model_type"), config.base_config["model_type"]
    if kind != wanted:
        raise ValueError(
            f"The base model of {name} is a {wanted!r}, but {config.base_model_name_or_path!r} is a {kind!r}."
        )
    if kind not in CONFIG_MAPPING and not trusted:
        raise ValueError(
            f"The base model {config.base_model_name_or_path!r} of {name} runs code of its own repository. Trust in {name} "
            "does not extend to it: read that code, then pass base_trust_remote_code=True."
        )


def _shapes(shapes: dict) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
