"""`AroundBase`: the common part of models that contain another model of transformers, their `base`."""

import torch
from transformers import GenerationConfig, PreTrainedModel

from .shared_wrapped_base import computed_buffers_kept


class AroundBase(PreTrainedModel):
    """A model around another one, its `base`, which provides embeddings, generation settings and gradient checkpointing."""

    base: PreTrainedModel
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def set_base(self, base: PreTrainedModel | None, auto_class) -> PreTrainedModel:
        """Sets the model inside and returns it.

        Args:
            base: a model with its weights; None builds one from `config.make_base_config()`, whose weights are loaded later.
            auto_class: Auto class that builds the new model.
        """
        if base is None:
            attention = self.config._attn_implementation
            options = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
            base = auto_class.from_config(self.config.make_base_config(), dtype=torch.get_default_dtype(), **options)
        else:
            # `post_init` leaves the weights of marked modules as they are.
            for module in base.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # a mark of transformers, no tensor
        if getattr(base, "generation_config", None) is None:
            base.generation_config = GenerationConfig()
        self.base = base
        return base

    @property
    def generation_config(self) -> GenerationConfig:
        """The generation config of the base model."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        # transformers sets a default value before the base model exists.
        if "base" in self._modules:
            self.base.generation_config = config

    def _apply(self, *args, **kwargs):
        with computed_buffers_kept(self.base):
            return super()._apply(*args, **kwargs)

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.base.set_output_embeddings(new_embeddings)

    def enable_input_require_grads(self) -> None:
        self.base.enable_input_require_grads()

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base.gradient_checkpointing_disable()
