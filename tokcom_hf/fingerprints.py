"""The settings that determine a run's result, as a flat dictionary by which two runs can be compared."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedConfig, TrainingArguments

# Fields of `TrainingArguments` that determine the trained weights. Logging, saving and evaluation intervals do not. Steps
# and epochs are not among them, because a run may be resumed for longer.
DECIDING = frozenset(
    [
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "optim",
        "optim_args",
        "seed",
        "data_seed",
        "bf16",
        "fp16",
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "train_sampling_strategy",
        "dataloader_drop_last",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ]
)
# Arguments of recipes and trainers that do not affect the trained weights.
COSMETIC = frozenset(
    [
        "output_dir",
        "overwrite",
        "resume_from_checkpoint",
        "resume",
        "threads",
        "sample_every",
        "num_samples",
        "metric_rows",
        "eval_noise_levels",
        "eval_times",
        "monitor_window",
        "num_pictures",
        "eval_max_new_tokens",
        "eval_questions",
        "eval_captions",
        "eval_images",
        "stop_on_nonfinite_loss",
        "early_stopping_patience",
        "wandb_project",
        "mode",
        "search",
        "trials",
        "available_gpus",
        "gpus_per_subtask",
        "save_parts",
    ]
)
# Fields that name a file, a folder or a Hub repository; files and folders are compared by content (`fingerprint`).
PATHS = frozenset(
    [
        "train_file",
        "validation_file",
        "eval_file",
        "image_text_file",
        "image_dir",
        "tokenizer",
        "base",
        "base_model",
        "init_from",
        "image_tokenizer",
        "match_tokcom",
    ]
)


def settings_of(
    sections: Mapping[str, type], values: Mapping[str, Mapping[str, Any]], ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the settings that determine a run's result, `{"section.field": value}`, defaults included.

    Args:
        sections: section name -> dataclass, as for `parse_recipe`, for one stage.
        values: fields that the configuration file and the command line set, as `parse_recipe` returns them.
        ignore: further fields that do not affect the result.
    """
    settings: dict[str, Any] = {}
    ignored = COSMETIC | set(ignore)
    for section, cls in sections.items():
        given = values[section]
        for item in dataclasses.fields(cls):
            name = item.name
            if item.init and not name.startswith("_") and name not in ignored and (name in given or _own(cls, name)):
                value = given.get(name, _default(item))
                settings[f"{section}.{name}"] = fingerprint(value) if name in PATHS else value
        if issubclass(cls, TrainingArguments):
            settings = {key: value for key, value in settings.items() if _decides(section, key)}
            parts = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
            # Only the total batch size counts: devices and gradient accumulation may divide it differently.
            settings[f"{section}.batch_size"] = parts[0] * parts[1] * PartialState().num_processes
    # Converted to what reading `run.json` returns, so that both can be compared.
    return json.loads(json.dumps(settings, default=str))


def _own(cls: type, name: str) -> bool:
    """Returns False for the fields that every model config has and for sub-configs, whose defaults are not compared."""
    if issubclass(cls, PreTrainedConfig):
        return name not in _names(PreTrainedConfig) and name not in cls.sub_configs
    return True


def _decides(section: str, key: str) -> bool:
    place, _, name = key.partition(".")
    return place != section or name in DECIDING or name not in _names(TrainingArguments)


def _names(cls: type) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)}


def _default(item: dataclasses.Field) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else None


def fingerprint(path: Any) -> Any:
    """Hashes the content of a path to 16 hexadecimal digits; returns any other value as it is.

    A file is hashed by its bytes. A folder with a model is hashed by configuration, tokenizer and weights (files above 64
    MiB by size, beginning and end). Any other folder is hashed by the names and sizes of its files.
    """
    if not isinstance(path, str) or not Path(path).exists():
        return path
    place, digest = Path(path), hashlib.sha256()
    if place.is_file():
        _read(place, digest)
    elif (place / "config.json").is_file():
        names = ["config.json", "tokenizer.json", "preprocessor_config.json"]
        for file in [
            *(place / name for name in names),
            *sorted(place.glob("*.safetensors")),
            *sorted(place.glob("*.bin")),
        ]:
            if file.is_file() and file.name != "training_args.bin":
                _read(file, digest, most=64 << 20)
    else:
        for file in sorted(place.rglob("*")):
            if file.is_file():
                line = f"{file.relative_to(place).as_posix()}\0{file.stat().st_size}\n"
                digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _read(path: Path, digest, most: int | None = None) -> None:
    size, block = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        if most is not None and size > most:
            digest.update(f"{size}\0".encode() + file.read(block))
            file.seek(size - block)
        while part := file.read(block):
            digest.update(part)
