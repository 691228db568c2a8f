"""Configuration of `TokComVAE`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_layers import check_transformer_shape
from .tokcom_removed import refuse_removed


@strict
class TokComVAEConfig(PreTrainedConfig):
    """Shape and losses of `TokComVAE`: a chunk of tokens to one latent and back. The defaults are the documented numbers.

    What you will most likely change:
        vocab_size: number of token ids **including** the omni token: `len(tokenizer) + 1`.
        omni_token_id: id that fills the decoder's query positions; None takes `vocab_size - 1`.
        chunk_size: tokens per latent.
        latent_size: width of a latent; None (documented) takes `hidden_size`, without projections. Smaller widths (64–128)
            train more reliably.

    Shape:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps: as in Llama.
        num_hidden_layers: layers of the encoder, and of the decoder where `num_decoder_layers` is None.
        num_decoder_layers: layers of the decoder.
        rope_theta: RoPE base for token positions; the denoiser's `rope_theta` counts chunks.
        chunk_projection: "last" (documented) reads the latent off the last position and gives it to the decoder's first,
            the other positions being omni tokens; "all" maps all positions to the latent and back, which learns about ten
            times faster because no attention head has to learn which position is which.

    Latent space (off by default, as documented):
        variational: predict mean and log-variance, sample in training, and add the KL term.
        kl_weight: weight of Σ_d max(KL_d, 0.5 nats) over latent dimensions d; read with `variational`.
        fixed_norm: scale every latent to root-mean-square 1.
        latent_noise: in training, add noise to the latents; its standard deviation is drawn from U(0, latent_noise), in
            units of the latents' own.
        token_dropout: in training, replace this share, in [0, 1), of the encoder's inputs by the omni token.
        hint_tokens: number of tokens before a chunk from which `Hint` shifts the chunk's noisy latent, for a second
            reconstruction loss; 0: no such loss. A multiple of `chunk_size`.

    Initial weights:
        initializer_range: standard deviation of all but the embedding.
        embedding_initializer_range: standard deviation of the embedding and of the head tied to it; None takes
            `initializer_range`. Larger embeddings weigh more in a latent: at 0.3 latents tell tens of thousands of tokens
            apart.
        zero_init_residual: the output projections of attention and MLP start at zero, so that the first steps learn one
            linear map for the whole vocabulary, rare tokens included.
        tie_word_embeddings: the head shares its weights with the embedding.
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
    fixed_norm: bool = False
    latent_noise: float | int = 0.0
    token_dropout: float | int = 0.0
    hint_tokens: int = 0
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
