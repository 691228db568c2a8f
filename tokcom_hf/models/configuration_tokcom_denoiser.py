"""Configuration of `DenoisedModel`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .layers import check_transformer_shape


@strict
class DenoisedModelConfig(PreTrainedConfig):
    """Flow-matching transformer over a sequence of latents. The defaults are the documented numbers.

    latent_size: width of a latent; equal to `hidden_size` there is no input projection (documented).
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, rms_norm_eps, rope_theta:
        as in Llama.
    time_scale: t ∈ [0, 1] is multiplied by this before the sinusoid; 1 is documented, 1000 resolves t better.
    time_max_period: longest period of the time sinusoid.
    output_size: width of the output; None means `latent_size`. `TokComConfig` sets it for "posterior_mean".
    self_conditioning: feed the previous prediction of the clean latents back as a second input.
    attention: "bidirectional" (documented), or "block_causal": a block sees the clean blocks before it, so that finished
        blocks can be cached and `generate(block_size=...)` becomes a dial from parallel to left-to-right.
    num_context_layers: layers of a causal encoder that reads clean chunks, once each; the num_hidden_layers of the denoiser
        then see clean chunks through its states only, and few of them are enough. 0: both kinds of chunks pass through
        the denoiser's layers (2503.09573). Needs "block_causal".
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
    output_size: int | None = None
    self_conditioning: bool = False
    attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    num_context_layers: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_transformer_shape(self)
        if self.num_context_layers < 0 or (self.num_context_layers and self.attention != "block_causal"):
            raise ValueError(
                f"num_context_layers must be 0, or positive with attention='block_causal'; got {self.num_context_layers} "
                f"with {self.attention!r}."
            )
        super().__post_init__(**kwargs)
