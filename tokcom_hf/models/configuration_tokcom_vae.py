"""Configuration of `TokComVAE`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_layers import check_transformer_shape
from .tokcom_removed import refuse_removed


@strict
class TokComVAEConfig(PreTrainedConfig):
    """Four text tokens in, one latent vector out, and back. The defaults are the documented numbers.

    What you will most likely change:
        vocab_size: number of token ids **including** the omni token: `len(tokenizer) + 1`.
        omni_token_id: id that fills the decoder's query positions; `vocab_size - 1` where not given.
        chunk_size: tokens per latent.
        latent_size: width of a latent; None means `hidden_size` and no projection (documented). 64–128 is sturdier.

    Shape:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps, rope_theta: as in Llama.
        num_hidden_layers: layers of the encoder, and of the decoder where `num_decoder_layers` is None.
        num_decoder_layers: layers of the decoder.

    chunk_projection: "last" (documented): the latent is read off the last position, and the decoder gets it at the first,
        its other positions being omni tokens. "all": one linear map reads all positions, one writes all of them; learns
        about ten times faster, because no attention head has to find out which position is which.

    Latent space (off by default, as documented):
        variational: predict mean and log-variance and sample in training (adds the KL term).
        kl_weight: weight of Σ_d max(KL_d, kl_free_nats).
        kl_free_nats: nats per dimension that cost nothing.
        fixed_norm: scale every latent to root-mean-square 1.
        latent_noise: in training add noise of standard deviation U(0, latent_noise) × the latents' own.
        token_dropout: in training replace this share of encoder inputs by the omni token.
        hint_tokens: in training a chunk's noisy latent is also decoded with a hint added to it, a small network's reading of
            so many tokens before it. Latents then lie so that what precedes a chunk moves them along straight lines,
            which a flow can follow; 0: no hint. A multiple of chunk_size.
        hint_weight: weight of that cross-entropy.
        zero_init_residual: attention and MLP of every block start at zero. What is known of one token's embedding then
            holds for all: the first steps learn a linear map for the whole vocabulary, tokens never seen included.
        initializer_range: standard deviation of the initial weights.
        embedding_initializer_range: that of the embedding, which is the head, too; None takes initializer_range. A latent
            holds a part of each token's embedding: 0.3 lets that part alone tell tens of thousands of tokens apart.
    """

    model_type = "tokcom_vae"

    vocab_size: int = 32017
    omni_token_id: int | None = None
    chunk_size: int = 4
    latent_size: int | None = None
    hidden_size: int = 896
    num_hidden_layers: int = 24
    num_decoder_layers: int | None = None
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    intermediate_size: int = 4864
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 1e6
    chunk_projection: Literal["last", "all"] = "last"
    variational: bool = False
    kl_weight: float | int = 1e-3
    kl_free_nats: float | int = 0.5
    fixed_norm: bool = False
    latent_noise: float | int = 0.0
    token_dropout: float | int = 0.0
    hint_tokens: int = 0
    hint_weight: float | int = 0.3
    zero_init_residual: bool = False
    initializer_range: float = 0.02
    embedding_initializer_range: float | int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        refuse_removed(self.model_type, kwargs)
        if self.latent_size is None:
            self.latent_size = self.hidden_size
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.omni_token_id is None:
            self.omni_token_id = self.vocab_size - 1
        if not 0 <= self.omni_token_id < self.vocab_size:
            raise ValueError(
                f"omni_token_id must be a row of the embedding (0 … {self.vocab_size - 1}), got {self.omni_token_id}."
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}.")
        if self.hint_tokens < 0 or self.hint_tokens % self.chunk_size:
            raise ValueError(
                f"hint_tokens must be a multiple of chunk_size={self.chunk_size}, got {self.hint_tokens}."
            )
        if not 0.0 <= self.token_dropout < 1.0:
            raise ValueError(f"token_dropout must be in [0, 1), got {self.token_dropout}.")
        check_transformer_shape(self)
        super().__post_init__(**kwargs)
