"""Configuration of `TokComModel`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from .configuration_tokcom_denoiser import DenoisedModelConfig
from .configuration_tokcom_vae import TokComVAEConfig
from .pipeline_files import PipelineTasks
from .tokcom_flow_matching import SAMPLERS
from .tokcom_removed import refuse_block_size, refuse_removed


def _part_field(part: str, name: str) -> property:
    return property(lambda config: getattr(getattr(config, part), name))


@strict
class TokComConfig(PreTrainedConfig):
    """VAE, denoiser, and what generation reads of the text so far. The defaults are the documented system.

    Parts:
        vae, denoiser: configurations of the two parts.
        context: configuration of the causal Llama that reads finished chunks as tokens. None (documented): the denoiser sees
            the latents of the whole row at once, a prompt's among them.

    Flow:
        standardize_latents: the flow runs on (z − mean) / std with the statistics of the training data.
        noise_std: standard deviation of the flow's noise x0; 0.05 is documented, 1 suits standardised latents.
        time_distribution, time_mean, time_std: training times, "uniform" (documented) or "logit_normal" σ(N(mean, std²)).

    Training of stage two (loss = sum of the weighted parts):
        mse_weight: of the squared error of x1, weighted as that of the velocity; 0 is documented.
        cross_entropy_weight: of the cross-entropy through the frozen decoder, nats per token; 1 is documented.
        head_weight: of the context's own heads, nats per token: the next token's, and half of that of the later ones.
        noise_draws: noisy copies of each block that share one pass of the context.
        block_sizes: chunks per block, one drawn for each batch; 0 stands for the whole row.
        context_dropout: share of the noisy blocks that are denoised without their context, which guidance needs.
        clean_prefix: without a context, a random prefix stays clean with its own t = 1 and out of the loss, as prompts are
            in generation; otherwise (documented) prompts are noised in training and t is one for all.
        prefix_dropout: share of training batches without such a prefix.
        self_conditioning_rate: share of training batches that see an earlier prediction (with denoiser.self_conditioning).
        max_chunks: chunks per row in training (1024 tokens / 4).

    Generation, where its caller does not say:
        block_size: chunks per block; 0 stands for all. Without a context it is 0.
        num_steps: steps of the flow per block; 50 is documented.
        step_power: the steps' times are u^step_power for equal steps of u; 1 is documented, more makes early steps small.
        sampler: "euler" (documented), "heun" or "renoise".
        eos_token_id: ends a generated sequence; None keeps everything.

    initializer_range: standard deviation of the initial weights.
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
    mse_weight: float | int = 0.0
    cross_entropy_weight: float | int = 1.0
    head_weight: float | int = 1.0
    noise_draws: int = 1
    block_sizes: tuple[int, ...] | list[int] = (0,)
    context_dropout: float | int = 0.0
    clean_prefix: bool = False
    prefix_dropout: float | int = 0.1
    self_conditioning_rate: float | int = 0.5
    max_chunks: int = 256
    block_size: int = 0
    num_steps: int = 50
    step_power: float | int = 1.0
    sampler: str = "euler"
    eos_token_id: int | None = None
    initializer_range: float = 0.02

    # What readers of a flat config look for, read-only: the shape is that of the denoiser, which runs at every step.
    vocab_size = _part_field("vae", "vocab_size")
    hidden_size = _part_field("denoiser", "hidden_size")
    num_hidden_layers = _part_field("denoiser", "num_hidden_layers")
    num_attention_heads = _part_field("denoiser", "num_attention_heads")
    num_key_value_heads = _part_field("denoiser", "num_key_value_heads")
    intermediate_size = _part_field("denoiser", "intermediate_size")

    def __post_init__(self, **kwargs):
        if refuse_removed(self.model_type, kwargs) and self.context is None:
            # Version 0.1.0 wrote block sizes into every folder; they acted with the removed kind of attention alone.
            self.block_sizes = [0]
            refuse_block_size(self.block_size)
        self.custom_pipelines = PipelineTasks("tokcom", kwargs.pop("custom_pipelines", None))
        if self.vae is None:
            self.vae = TokComVAEConfig()
        elif isinstance(self.vae, dict):
            self.vae = TokComVAEConfig(**self.vae)
        if isinstance(self.context, dict):
            # The context reads the VAE's tokens; a row for padding would be one more start token.
            self.context = LlamaConfig(**{"vocab_size": self.vae.vocab_size, "pad_token_id": None, **self.context})
        shape = {
            "latent_size": self.vae.latent_size,
            "context_size": None if self.context is None else self.context.hidden_size,
        }
        if not isinstance(self.denoiser, DenoisedModelConfig):
            self.denoiser = DenoisedModelConfig(**{**shape, **(self.denoiser or {})})
        for name, value in shape.items():
            if getattr(self.denoiser, name) != value:
                raise ValueError(
                    f"denoiser.{name} must be {value}, as the VAE and the context have it, got "
                    f"{getattr(self.denoiser, name)}; leave it out to have it filled in."
                )
        self.block_sizes = list(self.block_sizes)
        self._check_context()
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")
        if min(self.noise_draws, self.num_steps, self.max_chunks) < 1:
            raise ValueError(
                f"noise_draws, num_steps and max_chunks must be at least 1, got {self.noise_draws}, {self.num_steps} and "
                f"{self.max_chunks}."
            )
        if not (0 <= self.context_dropout < 1 and 0 <= self.prefix_dropout <= 1):
            raise ValueError(
                f"context_dropout must be in [0, 1) and prefix_dropout in [0, 1], got {self.context_dropout} and "
                f"{self.prefix_dropout}."
            )
        super().__post_init__(**kwargs)

    def _check_context(self) -> None:
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
