"""Configuration of `DenoisedModel`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_layers import check_transformer_shape
from .tokcom_removed import refuse_removed


@strict
class DenoisedModelConfig(PreTrainedConfig):
    """Flow-matching transformer over a sequence of latents. The defaults are the documented numbers.

    latent_size: width of a latent; equal to `hidden_size` there is no input projection (documented).
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, rms_norm_eps, rope_theta:
        as in Llama.
    time_scale: t ∈ [0, 1] is multiplied by this before the sinusoid; 1 is documented, 1000 resolves t better.
    time_max_period: longest period of the time sinusoid.
    context_size: width of the vector that tells each block what stands before it; None (documented): there is none.
    self_conditioning: feed the previous prediction of the clean latents back as a second input (arXiv 2208.04202).
    initializer_range: standard deviation of the initial weights.
    """

    model_type = "tokcom_denoiser"

    latent_size: int = 896
    hidden_size: int = 896
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    intermediate_size: int = 4864
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 1e6
    time_scale: float | int = 1.0
    time_max_period: float | int = 10000.0
    context_size: int | None = None
    self_conditioning: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        refuse_removed(self.model_type, kwargs)
        check_transformer_shape(self)
        super().__post_init__(**kwargs)
