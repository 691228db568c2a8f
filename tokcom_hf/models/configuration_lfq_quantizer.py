"""Configuration of `LFQQuantizer`."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_OUTPUT_DIM = 24


@strict
class LFQConfig(PreTrainedConfig):
    """Vision features become binary codes, and codes embeddings of a language model. Defaults are the documented numbers.

    What you will most likely change:
        input_size: width of the vision features.
        llm_hidden_size: width of the embeddings, that of the language model.
        num_tokens: features per image, a square grid; None takes any number.
        output_dim: bits per feature, 1 to 24; the vocabulary gains 2^output_dim tokens.

    Encoder:
        variant: `transformer` reads all features of an image together; `linear` is one projection of each feature.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
        rope_theta: base of the 2-D rotary positions: half of each head's pairs turn with the row, half with the column.
        qk_norm: RMS-normalise queries and keys per head.
        layer_norm_eps: of every normalisation.

    Codes:
        group_norm: normalise the bits' logits of an image, without learned scale and shift, before their sign is taken.
        norm_groups: groups of bits that share a mean and a variance; it divides output_dim.
        entropy_temperature: the entropy loss sees sigmoid(logit / entropy_temperature); below 1 it asks for clear bits.

    Losses (of `.loss`; a trainer may weigh them by itself):
        reconstruction_weight, entropy_weight.
    """

    model_type = "tokcom_lfq"

    input_size: int = 4096
    llm_hidden_size: int = 4096
    num_tokens: int | None = 256
    output_dim: int = 16
    variant: str = "transformer"
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    rope_theta: float | int = 10000.0
    qk_norm: bool = True
    layer_norm_eps: float = 1e-6
    group_norm: bool = True
    norm_groups: int = 1
    entropy_temperature: float | int = 0.25
    reconstruction_weight: float | int = 1.0
    entropy_weight: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not 1 <= self.output_dim <= MAX_OUTPUT_DIM:
            raise ValueError(f"output_dim must be 1 to {MAX_OUTPUT_DIM} bits, got {self.output_dim}.")
        if self.variant not in ("transformer", "linear"):
            raise ValueError(f"variant must be transformer or linear, got {self.variant!r}.")
        sizes = ["input_size", "llm_hidden_size", "norm_groups"]
        if self.variant == "transformer":
            sizes += ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.variant == "transformer" and self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 4 · num_attention_heads (2-D rotary positions take four numbers at "
                f"a time), got hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}."
            )
        if self.output_dim % self.norm_groups:
            raise ValueError(f"norm_groups {self.norm_groups} must divide output_dim {self.output_dim}.")
        if self.num_tokens is not None:
            if self.num_tokens < 1:
                raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}.")
            if self.variant == "transformer" and math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
                raise ValueError(f"num_tokens must be a square number, as an image's grid is, got {self.num_tokens}.")
        if self.entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be positive, got {self.entropy_temperature}.")
        for name in ("reconstruction_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        super().__post_init__(**kwargs)

    @property
    def codebook_size(self) -> int:
        """Number of codes, 2^output_dim."""
        return 1 << self.output_dim
