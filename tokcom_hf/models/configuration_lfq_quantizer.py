"""Configuration of `LFQQuantizer`."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_removed_fields import take_removed

MAX_OUTPUT_DIM = 24
# Removed fields and their former defaults, which modeling_lfq_quantizer.py holds as constants.
REMOVED = {
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-6,
    "norm_groups": 1,
    "entropy_temperature": 0.25,
    "reconstruction_weight": 1.0,
    "entropy_weight": 0.1,
}


@strict
class LFQConfig(PreTrainedConfig):
    """Shape of `LFQQuantizer`: vision features → binary codes → embeddings. The defaults are the documented numbers.

    What you will most likely change:
        input_size: width of the vision features.
        llm_hidden_size: width of the embeddings, which must be the language model's.
        num_tokens: vision features per image, a square number; other inputs are refused. None accepts any number.
        output_dim: bits of a feature's code, 1 to 24. More bits keep more of the feature; the language model's vocabulary
            gains 2^output_dim tokens.

    Encoder:
        variant: `transformer` (features of an image attend to each other) or `linear` (one projection of each feature).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: shape of the transformer; `linear` reads
            none of them.
        qk_norm: RMSNorm on the queries and keys of each head, which keeps attention logits bounded.

    Codes:
        group_norm: normalise all logits of an image's bits together to mean 0 and variance 1, without learned scale and
            shift.

    Initial weights:
        initializer_range: standard deviation of linear weights.
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
    qk_norm: bool = True
    group_norm: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        take_removed(kwargs, REMOVED)
        if not 1 <= self.output_dim <= MAX_OUTPUT_DIM:
            raise ValueError(f"output_dim must be 1 to {MAX_OUTPUT_DIM} bits, got {self.output_dim}.")
        if self.variant not in ("transformer", "linear"):
            raise ValueError(f"variant must be transformer or linear, got {self.variant!r}.")
        sizes = ["input_size", "llm_hidden_size"]
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
        if self.num_tokens is not None:
            if self.num_tokens < 1:
                raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}.")
            if self.variant == "transformer" and math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
                raise ValueError(f"num_tokens must be a square number, as an image's grid is, got {self.num_tokens}.")
        super().__post_init__(**kwargs)

    @property
    def codebook_size(self) -> int:
        """Number of codes, 2^output_dim."""
        return 1 << self.output_dim
