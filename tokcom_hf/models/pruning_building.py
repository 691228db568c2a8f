"""What `PrunedVLM.from_base` builds from: the loaded VLM, and a configuration that describes it and the stages."""

import os
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .configuration_pruned_vlm import PrunedVLMConfig
from .pruning_families import check_family, family_of
from .shared_wrapped_base import HUB_OPTIONS, LOADING_OPTIONS, named_as_dtype

# Fields of `PrunedVLMConfig` that `PrunedVLM.from_base` takes as further keywords.
STRATEGY_OPTIONS = ("strategy_layer", "strategy_seed")


def load_base(name: str | os.PathLike, **options) -> PreTrainedModel:
    """Loads the VLM at a Hub name or in a folder.

    Args:
        name: Hub name or folder.
        options: keywords of `from_pretrained`: `HUB_OPTIONS`, `LOADING_OPTIONS`, `trust_remote_code`, `subfolder`, ...

    Raises:
        TypeError: an option is unknown.
        ValueError: PrunedVLM does not support the model's family, or it is no image-text-to-text model.
    """
    options = named_as_dtype(options)
    known = (*HUB_OPTIONS, *LOADING_OPTIONS, "weights_only", "trust_remote_code", "variant", "subfolder")
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"PrunedVLM does not take {', '.join(map(repr, unknown))}.")
    hub = {key: value for key, value in options.items() if key in (*HUB_OPTIONS, "subfolder")}
    trust = options.get("trust_remote_code", False)
    check_family(AutoConfig.from_pretrained(name, trust_remote_code=trust, **hub))
    return AutoModelForImageTextToText.from_pretrained(name, **options | {"trust_remote_code": trust})


def given_or_loaded(model: str | os.PathLike | PreTrainedModel, loading: dict[str, Any]) -> PreTrainedModel:
    """A loaded VLM as it is, or the one that a name stands for, loaded with the options `loading`.

    Raises:
        TypeError: `loading` is not empty and the model is loaded already, or `model` is no model.
        ValueError: the model's family is not supported.
    """
    if isinstance(model, str | os.PathLike):
        return load_base(model, **loading)
    if loading:
        raise TypeError(
            f"PrunedVLM.from_base does not take {', '.join(map(repr, sorted(loading)))} with a loaded model; "
            "options of loading go with the name of a model."
        )
    family_of(model)
    return model


def config_around(
    model: PreTrainedModel, revision: str | None, token_merger, layer_pruner, **settings
) -> PrunedVLMConfig:
    """The configuration of a `PrunedVLM` around a loaded VLM.

    Args:
        model: the VLM.
        revision: branch, tag or commit from which the VLM was loaded, where one was named.
        token_merger, layer_pruner: the learned stages, as modules or configurations, or None.
        settings: further fields of `PrunedVLMConfig`.
    """
    return PrunedVLMConfig(
        base_model_name_or_path=model.config.name_or_path or None,
        base_revision=revision or getattr(model.config, "_commit_hash", None),
        base_config=model.config.to_dict(),
        token_merger=_as_dict(token_merger),
        layer_pruner=_as_dict(layer_pruner),
        **settings,
    )


def _as_dict(part) -> dict[str, Any] | None:
    """The fields of a stage's configuration."""
    if part is None:
        return None
    config = part.config if isinstance(part, PreTrainedModel) else part
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"token_merger and layer_pruner are modules or configurations, got {type(part).__name__}; write "
            "TokenMergerConfig(...) or LayerPrunerConfig(...)."
        )
    return {name: getattr(config, name) for name in type(config).__annotations__ if not name.startswith("_")}
