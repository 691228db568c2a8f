"""`equip_internvl` adds a quantizer and LFQ ids to a vision-language model, as described by a configuration."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from ..data.vqa_collator import require_placeholder
from ..evaluation.lfq_bases import image_tokens_of, width_of_input
from ..models.configuration_lfq_expanded import LFQExpandedConfig
from ..models.configuration_lfq_quantizer import LFQConfig
from ..models.lfq_building import load_base
from ..models.modeling_lfq_expanded import LFQExpandedModel
from ..models.modeling_lfq_quantizer import LFQQuantizer
from .lfq_joint_model import QUANTIZER_INPUTS, JointLFQModel
from .pruning_build import check_dtype

MODEL_KEYS = ("internvl_path", "vocab_expansion", "quantizer_input")
EXPANSION_KEYS = ("enabled", "embedding_init_method", "embedding_init_std", "freeze_original")
QUANTIZER_SECTIONS = ("quantizer", "lfq")


def equip_internvl(model, config, tokenizer=None) -> JointLFQModel:
    """Builds the model that `JointLFQTrainer` trains around an InternVL.

    model:
      internvl_path: OpenGVLab/InternVL3-1B-hf
      vocab_expansion: {enabled: true, embedding_init_method: random, embedding_init_std: 0.02, freeze_original: true}
    quantizer: {output_dim: 16, hidden_size: 1024}

    Args:
        model: a loaded model of transformers, or of remote code with an `llm_config` and a `language_model`; its Hub name or
            folder; or None for `config.model.internvl_path`.
        config: a mapping as above, or an object of OmegaConf; sections with other names are ignored. `quantizer` (or `lfq`,
            also inside `model`) holds fields of `LFQConfig`; widths and number of features default to the model's.
            `model.quantizer_input` is `projected` or `vision`; see `JointLFQModel`. With `enabled: false` the vocabulary
            is not expanded: the model learns to read quantized images, not to generate them.
        tokenizer: the model's tokenizer; with it, generation never chooses the unused rows of a padded vocabulary.

    Raises:
        ValueError: a key is unknown, the quantizer has two sections, there is no model, or parts do not fit.
        TypeError: a section is no mapping.
    """
    sections = _mapping(config, "config")
    settings = _mapping(sections.get("model", {}), "config.model")
    _check_keys(settings, (*MODEL_KEYS, *QUANTIZER_SECTIONS), "config.model")
    expansion = _mapping(settings.get("vocab_expansion", {}), "config.model.vocab_expansion")
    _check_keys(expansion, EXPANSION_KEYS, "config.model.vocab_expansion")
    quantizer = _quantizer_settings(sections, settings)
    enabled = expansion.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise ValueError(f"config.model.vocab_expansion.enabled must be true or false, got {enabled!r}.")
    if model is None:
        model = settings.get("internvl_path")
        if model is None:
            raise ValueError("There is no model to equip: give one, or set config.model.internvl_path.")
    if isinstance(model, (str, os.PathLike)):
        model = load_base(model)
    read = settings.get("quantizer_input", "projected")
    fitting = {
        "input_size": width_of_input(model, read),
        "llm_hidden_size": width_of_input(model, "projected"),
        "num_tokens": image_tokens_of(model),
    }
    lfq_config = LFQConfig(**fitting | quantizer)
    if enabled:
        model = LFQExpandedModel.from_base(model, lfq_config.output_dim, tokenizer=tokenizer, **expansion)
    return JointLFQModel(model, LFQQuantizer(lfq_config), read)


def check_joint_settings(run: Any) -> None:
    """Checks what is wrong with any base model, before one is loaded or trained.

    Args:
        run: has the attributes `prompt`, `caption_prompt`, `quantizer_input`, `dtype` and those of new rows.

    Raises:
        ValueError: a prompt lacks its placeholder, or another value is unknown.
    """
    require_placeholder("prompt", run.prompt, "{question}")
    require_placeholder("caption_prompt", run.caption_prompt, "{caption}")
    if run.quantizer_input not in QUANTIZER_INPUTS:
        raise ValueError(f"quantizer_input must be one of {', '.join(QUANTIZER_INPUTS)}, got {run.quantizer_input!r}.")
    check_dtype(run.dtype)
    LFQExpandedConfig(embedding_init_method=run.embedding_init_method, embedding_init_std=run.embedding_init_std)


def _mapping(value: Any, name: str) -> dict[str, Any]:
    """A mapping, such as an object of OmegaConf, as a dictionary; nested mappings are not converted."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping or an object of OmegaConf, got {type(value).__name__}.")
    return {str(key): value[key] for key in value}


def _quantizer_settings(sections: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    places = {f"config.{name}": sections[name] for name in QUANTIZER_SECTIONS if name in sections}
    places |= {f"config.model.{name}": settings[name] for name in QUANTIZER_SECTIONS if name in settings}
    if len(places) > 1:
        raise ValueError(f"The quantizer's settings are given twice, in {' and '.join(places)}; keep one of them.")
    for name, value in places.items():
        quantizer = _mapping(value, name)
        # Fields of every transformers configuration (dtype, ...) are accepted, too.
        inherited = {field.name for field in fields(PreTrainedConfig)}
        _check_keys([key for key in quantizer if key not in inherited], tuple(LFQConfig.__annotations__), name)
        return quantizer
    return {}


def _check_keys(found: Iterable[str], known: tuple[str, ...], name: str) -> None:
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}; it knows {', '.join(known)}.")
