"""Configuration of `TokComModel`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from .configuration_tokcom_denoiser import DenoisedModelConfig
from .configuration_tokcom_vae import TokComVAEConfig
from .pipeline_files import PipelineTasks
from .tokcom_flow_matching import check_sampler
from .tokcom_removed import refuse_block_size, refuse_removed


def _part_field(part: str, name: str) -> property:
    return property(lambda config: getattr(getattr(config, part), name))


@strict
class TokComConfig(PreTrainedConfig):
    """Parts, training objective and generation defaults of a `TokComModel`. The defaults are the documented system.

    Parts:
        vae, denoiser: configurations of the two parts.
        context: shape of the causal Llama that reads the tokens before a block. None (documented): a row is one block, and
            the denoiser sees a prompt's latents beside the noisy ones.

    Flow:
        standardize_latents: the flow runs on (z − mean) / std with the statistics of the training data.
        noise_std: standard deviation of the flow's noise x0; 0.05 is documented, 1 suits standardised latents.
        time_distribution, time_mean, time_std: training times, "uniform" (documented) or "logit_normal"
            σ(N(time_mean, time_std²)); a negative mean trains more on noisy latents.
        token_posterior: predict the clean latents by way of the posterior of each token (`TokenPosterior`). The denoiser
            then works on one state per token, of the width of the context, from left to right. Off (documented): it works
            on latents.
        heads_first: at t = 0, where the noisy latents are noise and say nothing of the tokens, the context's heads alone
            predict the first chunk of a block. Models with `token_posterior` only.
        token_order: the flow's space is scaled so that each token of a chunk stands out of the noise exp(token_order) times
            as far as the next one, and is decided before it (`TokenOrder`). 0 (documented) scales nothing. Models with
            `token_posterior` only.
        read_guesses: in each call of the denoiser the context reads on, behind the finished tokens, what is guessed of the
            block's own tokens. Its first head, which predicts the next token, takes the place of the heads of later tokens
            in what the denoiser starts from. In `generate` the denoiser adds to it as far as a guess before the token may be
            wrong, and the context alone decides a block's first token. Models with `token_posterior` only.
        recent_size: width in which `RecentTokens` reads the guesses at the three tokens before each token. It corrects each
            prediction, those between two calls of the denoiser, too, so that few calls are enough. 0 (documented): there is
            none. Models with `token_posterior` only.

    Training of stage two (the loss is the weighted sum):
        mse_weight: weight of the squared error of the velocity; 0 is documented.
        cross_entropy_weight: weight of the cross-entropy of the tokens, nats per token: of the frozen decoder on the
            predicted latents, or with `token_posterior` of the posterior; 1 is documented.
        head_weight: weight of the cross-entropy of the context's heads: that of the next token, plus a fifth of that of
            the later tokens of a chunk.
        told_weight: weight of the cross-entropy of the denoiser that is told the tokens before each token of every second
            block, and so learns which tokens follow each other. With `recent_size`, `RecentTokens` correct it, and are told
            the other blocks alone. With `read_guesses`, whose context knows which tokens follow each other, `RecentTokens`
            alone are told all blocks. Models with `token_posterior` only.
        noise_draws: noisy copies of each row's blocks that share one pass of the context; in training each copy starts at
            another token. A fraction 1/n trains the flow on every n-th block alone, for more text at the same cost.
        block_sizes: chunks per block; each batch draws one of these numbers. 0 is the whole row.
        context_dropout: share in [0, 1) of the noisy blocks that are denoised without their context. `guidance_scale` in
            generation needs a share above 0.
        clean_prefix: without a context, a random prefix of the row has t = 1 and no loss, as prompts have in generation.
            Off (documented): training noises the whole row at one t.
        max_chunks: chunks per row in training; 256 chunks of 4 tokens are the documented 1024 tokens.

    Defaults of `generate`:
        block_size: chunks per block; 0 is all, and the only size without a context.
        num_steps: steps of the flow per block, each one call of the denoiser; 50 is documented.
        step_power: the times of the steps are u^step_power for equal steps of u; 1 is documented, above 1 the steps near the
            noise are small.
        step_quantiles: the times of the steps are quantiles of the logit-normal training times instead, so that most of
            them lie where training had most.
        sampler: "euler" (documented), "heun" (second order, twice the calls), "multistep" (second order, from the prediction
            before), "multirate" (the same, in small steps between the calls) or "renoise" (stochastic).
        eos_token_id: id that ends a sequence; None: sequences have their full length.
    """

    model_type = "tokcom"
    sub_configs = {"vae": TokComVAEConfig, "denoiser": DenoisedModelConfig, "context": LlamaConfig}

    vae: TokComVAEConfig | dict | None = None
    denoiser: DenoisedModelConfig | dict | None = None
    context: LlamaConfig | dict | None = None
    standardize_latents: bool = False
    noise_std: float | int = 0.05
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float | int = -0.5
    time_std: float | int = 1.0
    token_posterior: bool = False
    heads_first: bool = False
    token_order: float | int = 0.0
    recent_size: int = 0
    read_guesses: bool = False
    mse_weight: float | int = 0.0
    cross_entropy_weight: float | int = 1.0
    head_weight: float | int = 1.0
    told_weight: float | int = 0.0
    noise_draws: float | int = 1
    block_sizes: tuple[int, ...] | list[int] = (0,)
    context_dropout: float | int = 0.0
    clean_prefix: bool = False
    max_chunks: int = 256
    block_size: int = 0
    num_steps: int = 50
    step_power: float | int = 1.0
    step_quantiles: bool = False
    sampler: str = "euler"
    eos_token_id: int | None = None

    # Read-only names that libraries expect of a flat config: the shape is the denoiser's, which runs at every step.
    vocab_size = _part_field("vae", "vocab_size")
    hidden_size = _part_field("denoiser", "hidden_size")
    num_hidden_layers = _part_field("denoiser", "num_hidden_layers")
    num_attention_heads = _part_field("denoiser", "num_attention_heads")
    num_key_value_heads = _part_field("denoiser", "num_key_value_heads")
    intermediate_size = _part_field("denoiser", "intermediate_size")

    def __post_init__(self, **kwargs):
        if refuse_removed(self.model_type, kwargs) and self.context is None:
            # Version 0.1.0 wrote block sizes into every folder; they acted only with a kind of attention that is removed.
            self.block_sizes = [0]
            refuse_block_size(self.block_size)
        self.custom_pipelines = PipelineTasks("tokcom", kwargs.pop("custom_pipelines", None))
        self._build_parts()
        self.block_sizes = list(self.block_sizes)
        self._check_blocks()
        check_sampler(self.sampler, self)
        if self.noise_draws <= 0 or max(self.noise_draws, 1 / self.noise_draws) % 1:
            raise ValueError(f"noise_draws must be a whole number or 1 divided by one, got {self.noise_draws}.")
        for name in ("num_steps", "max_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.step_quantiles and (self.time_distribution, self.step_power) != ("logit_normal", 1.0):
            raise ValueError(
                "step_quantiles needs time_distribution='logit_normal' and leaves step_power no meaning; got "
                f"{self.time_distribution!r} and step_power={self.step_power}."
            )
        if not 0 <= self.context_dropout < 1:
            raise ValueError(f"context_dropout must be in [0, 1), got {self.context_dropout}.")
        for name in ("heads_first", "token_order", "told_weight", "recent_size", "read_guesses"):
            if getattr(self, name) and not self.token_posterior:
                raise ValueError(f"{name}={getattr(self, name)} needs token_posterior=True, which predicts tokens.")
        for name in ("token_order", "told_weight", "recent_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.read_guesses and self.told_weight and not self.recent_size:
            raise ValueError(
                f"With read_guesses, told_weight={self.told_weight} trains recent tokens alone; set recent_size, or "
                "told_weight to 0."
            )
        super().__post_init__(**kwargs)

    def _build_parts(self) -> None:
        """Builds the configurations of the parts; what two parts share is filled in, or checked."""
        if not isinstance(self.vae, TokComVAEConfig):
            self.vae = TokComVAEConfig(**self.vae or {})
        if isinstance(self.context, dict):
            # The context reads the VAE's tokens and no others, so its table has no row for padding.
            self.context = LlamaConfig(**{"vocab_size": self.vae.vocab_size, "pad_token_id": None, **self.context})
        context_size = None if self.context is None else self.context.hidden_size
        width = context_size if self.token_posterior else self.vae.latent_size
        if width is None:
            raise ValueError(
                "token_posterior needs a context, whose table holds the tokens' states; set it, or leave it off."
            )
        shared = {"latent_size": width, "context_size": context_size, "causal": self.token_posterior}
        if not isinstance(self.denoiser, DenoisedModelConfig):
            self.denoiser = DenoisedModelConfig(**shared | (self.denoiser or {}))
        for name, value in shared.items():
            if getattr(self.denoiser, name) != value:
                raise ValueError(
                    f"denoiser.{name} must be {value}, as VAE, context and token_posterior have it, got "
                    f"{getattr(self.denoiser, name)}; leave it out to have it filled in."
                )

        if self.token_posterior and self.denoiser.self_conditioning:
            raise ValueError(
                "denoiser.self_conditioning has no meaning with token_posterior; set one of the two to false."
            )

    def _check_blocks(self) -> None:
        if self.context is None:
            if self.block_sizes != [0] or self.block_size or self.noise_draws != 1 or self.context_dropout:
                raise ValueError(
                    "Without a context the whole row is one block: block_sizes must be [0], block_size 0, noise_draws 1 and "
                    f"context_dropout 0; got {self.block_sizes}, {self.block_size}, {self.noise_draws} and "
                    f"{self.context_dropout}. Set context to the shape of a LlamaConfig for smaller blocks."
                )
            return
        if self.context.vocab_size != self.vae.vocab_size:
            raise ValueError(
                f"context.vocab_size must be the VAE's {self.vae.vocab_size}, got {self.context.vocab_size}."
            )
        if self.clean_prefix:
            raise ValueError(
                "clean_prefix is for models without a context, which read a prompt's latents; set it to false."
            )
        if not self.block_sizes or min(*self.block_sizes, self.block_size) < 0:
            raise ValueError(
                f"block_sizes must hold at least one size, and none may be negative; got {self.block_sizes} and "
                f"block_size={self.block_size}."
            )
