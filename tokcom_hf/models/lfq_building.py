"""What `LFQExpandedModel.from_base` builds from: the loaded base model, and a configuration that describes it."""

import os

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from .configuration_lfq_expanded import LFQExpandedConfig
from .lfq_rows import vocabulary_of
from .shared_tokenizer_size import tokenizer_size
from .shared_wrapped_base import HUB_OPTIONS


def given_or_loaded(model: str | os.PathLike | PreTrainedModel, loading: dict) -> PreTrainedModel:
    """A loaded base model as it is, or the one that a name stands for, loaded with the options `loading`.

    Raises:
        TypeError: `loading` is not empty and the model is loaded already, or `model` is no model of transformers.
        ValueError: the model has LFQ tokens already.
    """
    if isinstance(model, str | os.PathLike):
        model = load_base(model, **loading)
    elif loading:
        raise TypeError(f"{', '.join(loading)} can only be given together with the name of a model.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"LFQExpandedModel wraps a model of transformers, its Hub name or folder, got {type(model).__name__}."
        )
    merged = getattr(model.config.get_text_config(), "lfq_output_dim", None)
    if merged is not None or model.config.model_type == LFQExpandedConfig.model_type:
        raise ValueError(
            "This model already has LFQ tokens"
            + (f" (output_dim={merged}, merged into its tables)" if merged is not None else "")
            + "; expand the base model it was made from."
        )
    return model


def config_around(model: PreTrainedModel, tokenizer, **settings) -> LFQExpandedConfig:
    """The configuration of an `LFQExpandedModel` around a loaded base model.

    Args:
        model: the base model.
        tokenizer: the base model's tokenizer, whose size becomes `text_vocab_size`, or None.
        settings: further fields of `LFQExpandedConfig`.
    """
    reference, revision = reference_of(model)
    return LFQExpandedConfig(
        lfq_start_token_id=len(vocabulary_of(model)[0].weight),
        text_vocab_size=None if tokenizer is None else tokenizer_size(tokenizer),
        base_config=model.config.to_dict(),
        base_auto_class=auto_class_of(model),
        base_model_name_or_path=reference,
        base_revision=revision,
        **settings,
    )


def auto_class_of(model: PreTrainedModel) -> str:
    """Name of the Auto class that builds a model of this class.

    Raises:
        ValueError: a class of transformers that neither AutoModelForCausalLM nor AutoModelForImageTextToText builds.
    """
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if auto_class._model_mapping.get(type(model.config), None) is type(model):
            return auto_class.__name__
    if type(model).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{type(model).__name__} is built neither by AutoModelForCausalLM nor by AutoModelForImageTextToText, so a "
            "saved LFQExpandedModel could not load its base model."
        )
    return "AutoModel"


def load_base(name: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Loads the causal or image-text-to-text model at a Hub name or in a folder; keywords are those of `from_pretrained`."""
    name = os.fspath(name)
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise OSError(f"No such model folder: {name!r}.")
    hub = {key: kwargs[key] for key in (*HUB_OPTIONS, "subfolder", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **hub)
    both = AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if type(config) in both else AutoModelForCausalLM
    return auto_class.from_pretrained(name, **kwargs)


def reference_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Hub name or absolute folder that a model was loaded from, and its commit; (None, None) where built in memory."""
    name = model.config.name_or_path or None
    if name is not None and os.path.isdir(name):
        return os.path.abspath(name), None
    return name, getattr(model.config, "_commit_hash", None)
