"""Configuration of `TokComModel`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_tokcom_denoiser import DenoisedModelConfig
from .configuration_tokcom_vae import TokComVAEConfig
from .pipeline_files import PipelineTasks


@strict
class TokComConfig(PreTrainedConfig):
    """VAE + denoiser + the statistics of the latents. The defaults are the documented numbers.

    vae, denoiser: configurations of the two parts.
    standardize_latents: the flow runs on (z − mean) / std with the statistics of the training data.
    clean_latents: what the denoiser predicts. "latent" (documented): x1 itself. "posterior_mean": a distribution over each
        token of the chunk, trained with cross-entropy; x1 is then its mean latent, E[x1 | x_t] exactly, so that the
        sampler follows the flow's own velocity (2211.15089, 2305.18619). Needs a VAE with encoder="embedding".
    noise_likelihood: add log p(x_t | token), which is known, to the logits of "posterior_mean": by Bayes' rule the denoiser
        then only learns how likely a token is given everything else.
    scale_input: the denoiser sees t · x_t / (t² + (1 − t)² · noise_std²), what is expected of x1 given x_t if x1 were
        Gaussian of unit variance: nothing of pure noise, and the same for a certain chunk whatever its t (2206.00364).
    token_time_std: in training the tokens of a chunk have times of their own, spread by this much in logits around the
        chunk's, so that a token is also learned from its neighbours while it is not known itself; 0: one time per chunk.
        Needs noise_likelihood and mse_weight=0; makes `generate(token_lag=...)` possible.
    token_cut_rate: share of training chunks whose tokens are clean up to a random place and noise from it on instead, as
        `generate(sampler="commit")` meets them. Needs token_time_std.
    noise_copies: noisy copies of each row in a training step, which share one pass of the context encoder. The cuts of a
        chunk differ between its copies and each copy is asked for the token behind its cut: with as many copies as a
        chunk has tokens, every token is learned from all those before it. With token_cut_rate > 0 a chunk without a cut is
        asked for that one token too, if its time is early enough. Above 1 it needs denoiser.num_context_layers.
    token_loss_max_time: tokens at later times are not asked for: their own latents already tell which they are, so that
        their loss is next to zero and only costs time; they count as zero. Needs token_time_std; 1: ask for all.
    token_window_size: width of a map, one for all tokens, that adds to each token's distribution what the tokens beside it
        tell (models/token_window.py); 0: none. Needs "posterior_mean".
    token_attention_heads: heads of an attention over the single tokens of finished chunks, from which each token's
        distribution reads what stood where before (models/token_attention.py); 0: none. Needs "posterior_mean" and
        denoiser.attention="block_causal".
    token_mlp_size: width of a SwiGLU behind that attention, which works on what each token has read; 0: none. Needs
        token_attention_heads.
    train_embeddings: the token tables of the VAE train with the denoiser, so that latents of alike tokens come to lie near
        each other (2211.15089); otherwise the VAE is frozen (documented). Needs "posterior_mean" and
        vae.nearest_decoder.
    independent_times: every position behind the clean prefix draws its own training time (2407.01392), so that
        `generate(block_size=...)` may finish blocks from left to right; otherwise all share one.
    noise_std: standard deviation of the flow's noise x0; 0.05 is documented, 1–2 on standardised latents works. Hiding a
        token of twice the width takes √2 times the noise: √(latent_size / chunk_size / 32) is as hard as 1 at width 32.
    time_distribution, time_mean, time_std: training times, "uniform" (documented) or "logit_normal" σ(N(mean, std²)).
    mse_weight: weight of the velocity-weighted squared error of x1; 0 is documented.
    cross_entropy_weight: weight of the cross-entropy through the frozen decoder; 1 is documented.
    clean_prefix: in training a random prefix stays clean with its own t = 1 and out of the loss, as prompts are in
        generation; without it (documented) prompts are noised in training and t is one for all.
    prefix_dropout: share of training rows without any clean prefix (needed for guidance).
    self_conditioning_rate: share of training steps that see an earlier prediction (with denoiser.self_conditioning).
    block_sizes: chunks per block drawn in training of a block_causal denoiser; 0 stands for the whole sequence.
    sampler, block_size: what `generate` does where its caller does not say; block_size 0 stands for all chunks.
    eos_token_id: ends a generated sequence and fills the chunk before an odd prompt; None keeps everything.
    max_chunks: chunks per sequence in training (1024 tokens / 4).
    """

    model_type = "tokcom"
    sub_configs = {"vae": TokComVAEConfig, "denoiser": DenoisedModelConfig}

    vae: TokComVAEConfig | dict | None = None
    denoiser: DenoisedModelConfig | dict | None = None
    standardize_latents: bool = False
    clean_latents: Literal["latent", "posterior_mean"] = "latent"
    noise_likelihood: bool = False
    scale_input: bool = False
    token_time_std: float | int = 0.0
    token_cut_rate: float | int = 0.0
    token_loss_max_time: float | int = 1.0
    noise_copies: int = 1
    token_window_size: int = 0
    token_attention_heads: int = 0
    token_mlp_size: int = 0
    train_embeddings: bool = False
    independent_times: bool = False
    noise_std: float | int = 0.05
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float | int = -1.0
    time_std: float | int = 0.8
    mse_weight: float | int = 0.0
    cross_entropy_weight: float | int = 1.0
    clean_prefix: bool = False
    prefix_dropout: float | int = 0.1
    self_conditioning_rate: float | int = 0.5
    block_sizes: tuple[int, ...] | list[int] = (1, 4, 16, 64, 0)
    sampler: Literal["euler", "renoise", "heun", "commit"] = "euler"
    block_size: int = 0
    eos_token_id: int | None = None
    max_chunks: int = 256
    initializer_range: float = 0.02

    # What readers of a flat config look for, read-only: the shape is that of the denoiser, which runs at every step.
    @property
    def vocab_size(self) -> int:
        """Rows of the VAE's embedding, the omni token included."""
        return self.vae.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the denoiser."""
        return self.denoiser.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the denoiser."""
        return self.denoiser.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the denoiser."""
        return self.denoiser.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of the denoiser."""
        return self.denoiser.num_key_value_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the denoiser's MLPs."""
        return self.denoiser.intermediate_size

    def __post_init__(self, **kwargs):
        self.custom_pipelines = PipelineTasks("tokcom", kwargs.pop("custom_pipelines", None))
        if self.vae is None:
            self.vae = TokComVAEConfig()
        elif isinstance(self.vae, dict):
            self.vae = TokComVAEConfig(**self.vae)
        if self.denoiser is None:
            self.denoiser = DenoisedModelConfig(latent_size=self.vae.latent_size)
        elif isinstance(self.denoiser, dict):
            self.denoiser = DenoisedModelConfig(**{"latent_size": self.vae.latent_size, **self.denoiser})
        if self.denoiser.latent_size != self.vae.latent_size:
            raise ValueError(
                f"VAE and denoiser must agree on latent_size, got {self.vae.latent_size} and "
                f"{self.denoiser.latent_size}."
            )
        if self.clean_latents == "posterior_mean":
            if self.vae.encoder != "embedding":
                raise ValueError(
                    "clean_latents='posterior_mean' needs a VAE whose latents are linear in token embeddings: set "
                    "vae.encoder='embedding'."
                )
            self.denoiser.output_size = self.vae.chunk_size * self.vae.hidden_size
        if self.noise_likelihood and self.clean_latents != "posterior_mean":
            raise ValueError("noise_likelihood belongs to clean_latents='posterior_mean'; latents have no logits.")
        if self.token_window_size and self.clean_latents != "posterior_mean":
            raise ValueError("token_window_size belongs to clean_latents='posterior_mean'; latents have no tokens.")
        heads, width = self.token_attention_heads, self.vae.hidden_size
        if heads and (self.clean_latents != "posterior_mean" or self.denoiser.attention != "block_causal"):
            raise ValueError(
                "token_attention_heads belongs to clean_latents='posterior_mean' with denoiser.attention='block_causal': it "
                f"reads tokens of finished chunks; got {self.clean_latents!r} and {self.denoiser.attention!r}."
            )
        if heads < 0 or (heads and width % (2 * heads)):
            raise ValueError(
                f"vae.hidden_size must be an even multiple of token_attention_heads, got {width} and {heads}."
            )
        if self.token_mlp_size < 0 or (self.token_mlp_size and not heads):
            raise ValueError(
                "token_mlp_size must not be negative and works on what a token attention reads: set token_attention_heads; "
                f"got {self.token_mlp_size} and {heads}."
            )
        if self.token_time_std > 0 and (not self.noise_likelihood or self.mse_weight > 0):
            raise ValueError(
                "token_time_std needs noise_likelihood=True (it knows the times of tokens) and mse_weight=0."
            )
        if self.noise_copies < 1 or (self.noise_copies > 1 and not self.denoiser.num_context_layers):
            raise ValueError(
                f"noise_copies must be 1, or more with denoiser.num_context_layers > 0; got {self.noise_copies} with "
                f"{self.denoiser.num_context_layers} such layers."
            )
        if self.token_time_std == 0 and (self.token_cut_rate > 0 or self.token_loss_max_time < 1):
            raise ValueError(
                "token_cut_rate and token_loss_max_time are about times of tokens: set token_time_std > 0, or leave them at "
                f"0 and 1; got {self.token_cut_rate} and {self.token_loss_max_time}."
            )
        if self.block_size < 0 or (self.sampler == "commit" and self.token_time_std == 0):
            raise ValueError(
                f"block_size must not be negative, and sampler='commit' needs token_time_std > 0; got {self.block_size}, "
                f"{self.sampler!r} and {self.token_time_std}."
            )
        if self.train_embeddings and (self.clean_latents != "posterior_mean" or not self.vae.nearest_decoder):
            raise ValueError(
                "train_embeddings moves the table that latents are made of, which only the nearest-embedding decoder can "
                "follow: set clean_latents='posterior_mean', vae.encoder='embedding' and vae.nearest_decoder=True."
            )
        if self.clean_latents == "posterior_mean" and self.vae.nearest_decoder and not self.train_embeddings:
            raise ValueError(
                "With vae.nearest_decoder=True nothing but the denoiser's stage trains the head of the token "
                "distributions: set train_embeddings=True."
            )
        self.block_sizes = list(self.block_sizes)
        super().__post_init__(**kwargs)
