"""`AroundBase`: what models with another model of transformers inside, their `base`, have in common."""

import torch
from transformers import GenerationConfig, PreTrainedModel

from .shared_wrapped_base import computed_buffers_kept


class AroundBase(PreTrainedModel):
    """A model around another one, its `base`, which keeps its class and its way of checkpointing gradients."""

    base: PreTrainedModel
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def set_base(self, base: PreTrainedModel | None, auto_class) -> PreTrainedModel:
        """Makes `base` the model inside; where it is None, one with fresh weights, which loading fills.

        Args:
            base: a model whose weights are there already.
            auto_class: builds a model of `config.make_base_config()`.
        """
        if base is None:
            attention = self.config._attn_implementation
            options = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
            base = auto_class.from_config(self.config.make_base_config(), dtype=torch.get_default_dtype(), **options)
        else:
            # `post_init` draws the weights of all modules that are not marked.
            for module in base.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # a mark of transformers, no tensor
        if getattr(base, "generation_config", None) is None:
            base.generation_config = GenerationConfig()
        self.base = base
        return base

    @property
    def generation_config(self) -> GenerationConfig:
        """The base model's, which generates; it is saved with this model."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        # transformers sets one of its own before there is a base model.
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
