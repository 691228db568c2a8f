"""Configuration of `LFQExpandedModel`."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .lfq_tokens import check_output_dim
from .pipeline_files import PipelineTasks
from .shared_removed_fields import take_removed

INIT_METHODS = ("random", "zeros", "mean")
# Removed fields and their former defaults. With another order of bits every LFQ id would mean another code.
REMOVED = {"bit_order": "least_significant_first"}
# Auto classes that build a base model; AutoModel serves remote code that registers with no other.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")


@strict
class LFQExpandedConfig(PreTrainedConfig):
    """A language or vision-language model and the 2^output_dim visual tokens added to its vocabulary.

    The tokens:
        output_dim: bits of an LFQ code, 1 to 24; 2^output_dim ids are added, so each further bit doubles the new rows.
        lfq_start_token_id: first new id, which is the number of embedding rows of the base model (a padded vocabulary has
            more rows than its tokenizer has ids).
        text_vocab_size: number of ids of the tokenizer. Ids from here to `lfq_start_token_id` are padding rows, which no
            `mode` of `generate` emits. None (default): the vocabulary is not padded.

    Initial values and training of the new rows:
        embedding_init_method: `random` (default; normal), `zeros`, or `mean` (mean of the old rows plus small offsets that
            depend on the bits, so that rows differ).
        embedding_init_std: standard deviation of `random` rows and of the offsets of `mean`, >= 0.
        freeze_original: freeze the base model's vocabulary tables, so that only new rows of the vocabulary train.
            `LFQExpandedModel.freeze_base()` also freezes the base model's other weights.

    The base model:
        base_config: configuration of the base model as a dictionary.
        base_auto_class: the Auto class that builds the base model, one of `AUTO_CLASSES`.
        base_model_name_or_path: Hub name or folder of the base model; `./base` is a folder inside the saved one.
        base_revision: Hub commit that the base model was loaded from, and is loaded from again.
        base_included: True: this checkpoint holds the base model's weights. False: they are loaded from
            `base_model_name_or_path`.
    """

    model_type = "tokcom_lfq_expanded"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    output_dim: int = 16
    lfq_start_token_id: int = 0
    text_vocab_size: int | None = None
    embedding_init_method: str = "random"
    embedding_init_std: float | int = 0.02
    freeze_original: bool = True
    base_config: dict[str, Any] | None = None
    base_auto_class: str = "AutoModelForCausalLM"
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_included: bool = True

    def __post_init__(self, **kwargs):
        take_removed(kwargs, REMOVED)
        self.custom_pipelines = PipelineTasks("lfq", kwargs.pop("custom_pipelines", None))
        check_output_dim(self.output_dim)
        # `vocab_size` is no field: two fields give it. Another model's config.json has none of the two and is refused later.
        given = kwargs.pop("vocab_size", None)
        if given is not None and self.lfq_start_token_id and given != self.vocab_size:
            raise ValueError(
                f"vocab_size={given} is not lfq_start_token_id + 2^output_dim = {self.vocab_size}; leave it out."
            )
        if self.embedding_init_method not in INIT_METHODS:
            raise ValueError(
                f"embedding_init_method must be one of {', '.join(INIT_METHODS)}, got {self.embedding_init_method!r}."
            )
        if self.embedding_init_std < 0:
            raise ValueError(f"embedding_init_std must be >= 0, got {self.embedding_init_std}.")
        if self.text_vocab_size is not None and not 0 < self.text_vocab_size <= self.lfq_start_token_id:
            raise ValueError(
                f"text_vocab_size must be from 1 to {self.lfq_start_token_id}, the rows of the base model's table, got "
                f"{self.text_vocab_size}. A tokenizer with more ids than the model has rows needs "
                "model.resize_token_embeddings(len(tokenizer)) before the vocabulary is expanded."
            )
        if self.base_auto_class not in AUTO_CLASSES:
            raise ValueError(
                f"base_auto_class must be one of {', '.join(AUTO_CLASSES)}, got {self.base_auto_class!r}."
            )
        if (self.base_config or {}).get("model_type") == self.model_type:
            raise ValueError("The base of an LFQExpandedModel is a plain model, not another LFQExpandedModel.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as saved; its `auto_map` names the saved code for the base model's Auto class, too."""
        values = super().to_dict()
        classes = values.get("auto_map") or {}
        names = ("AutoModel", self.base_auto_class)
        code = next((classes[name] for name in names if name in classes), None)
        if code is not None:
            values["auto_map"] = classes | dict.fromkeys(names, code)
        return values

    @property
    def lfq_token_range(self) -> tuple[int, int]:
        """`(start, end)` of the new ids, end exclusive."""
        return self.lfq_start_token_id, self.lfq_start_token_id + 2**self.output_dim

    @property
    def vocab_size(self) -> int:
        """Number of ids, old and new."""
        return self.lfq_token_range[1]

    def make_base_config(self) -> PreTrainedConfig:
        """The base model's configuration as an object."""
        if self.base_config is None:
            raise ValueError("This LFQExpandedConfig has no base_config; use LFQExpandedModel.from_base.")
        return _as_config(self.base_config)

    def base_class(self):
        """The Auto class that builds the base model."""
        return getattr(transformers, self.base_auto_class)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's configuration with the larger vocabulary, which generation reads."""
        if self.base_config is None:
            return self
        values = self.base_config
        if values["model_type"] not in CONFIG_MAPPING:
            # A configuration class of remote code is known only once the base model is loaded; plain values suffice here.
            text = _as_config(values.get("llm_config") or values.get("text_config") or values)
        else:
            text = _as_config(values).get_text_config(*args, **kwargs)
        text.vocab_size = self.lfq_token_range[1]
        return text


def _as_config(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    kind = values.pop("model_type", None)
    return AutoConfig.for_model(kind, **values) if kind in CONFIG_MAPPING else PreTrainedConfig(**values)
