"""Configuration of `DenoisedModel`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_layers import check_transformer_shape
from .tokcom_removed import refuse_removed


@strict
class DenoisedModelConfig(PreTrainedConfig):
    """Shape of the flow-matching transformer over latents. The defaults are the documented numbers.

    latent_size: width of a latent, or of a token's state in a `TokComModel` with `token_posterior`; where it equals
        `hidden_size`, as documented, there is no input projection.
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, rms_norm_eps: as in Llama.
    rope_theta: RoPE base for chunk positions.
    time_scale: factor of t ∈ [0, 1] before its sinusoidal embedding; 1 is documented, 1000 gives times that differ by 0.01
        clearly different embeddings.
    context_size: width of the context's state before a block; None (documented): the denoiser takes no context.
    causal: each position attends to itself and to earlier ones alone; a `TokComModel` fills it in: True with
        `token_posterior`. Off (documented): every position attends to all.
    self_conditioning: take the previous prediction of the clean latents as a second input (arXiv 2208.04202).
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
    context_size: int | None = None
    causal: bool = False
    self_conditioning: bool = False

    def __post_init__(self, **kwargs):
        refuse_removed(self.model_type, kwargs)
        check_transformer_shape(self)
        super().__post_init__(**kwargs)
