"""DenoisedModel: a flow-matching transformer over text latents with adaLN-Zero time conditioning.

x_t, t → layers of attention and SwiGLU, each after RMSNorm · (1 + scale) + shift → norm → linear → clean latents x1.
Scale and shift are computed from a condition (arXiv 2212.09748): the embedded time, and with `context_size` also the
context's state before the block and the position of each chunk in it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_tokcom_denoiser import DenoisedModelConfig
from .shared_layer_outputs import LayerRecord, as_asked
from .shared_layers import Attention, SwiGLU, rotary_embeddings
from .shared_strict_loading import StrictLoading

# Longest period of the sinusoids of time and position.
MAX_PERIOD = 10000.0


@dataclass
class DenoisedModelOutput(ModelOutput):
    """Output of `DenoisedModel`.

    clean_latents: (batch, chunks, latent).
    hidden_states: with `output_hidden_states`, (batch, chunks, hidden) before the first layer and after each layer, the last
        one normalised.
    attentions: with `output_attentions`, (batch, heads, chunks, chunks) of each layer.
    """

    clean_latents: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def sinusoid(values: torch.Tensor, size: int) -> torch.Tensor:
    """values (…) → (…, size) float32: cosines, then sines, at frequencies MAX_PERIOD^(−i / half)."""
    half = size // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=values.device) / half)
    angles = values.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AdaptiveNorm(nn.Module):
    """RMSNorm(h) · (1 + scale) + shift, with (scale, shift) = Linear(SiLU(condition))."""

    def __init__(self, config: DenoisedModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        # adaLN-Zero: scale and shift start at zero.
        linear.zero_init = True  # type: ignore[assignment]  # a mark for `_init_weights`, no submodule
        self.scale_shift_mlp = nn.Sequential(nn.SiLU(), linear)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, chunks, hidden); condition: a shape that broadcasts to it, batch or chunks being 1."""
        scale, shift = self.scale_shift_mlp(condition).chunk(2, dim=-1)
        return self.norm(hidden_states) * (1 + scale) + shift


class DenoiserBlock(GradientCheckpointingLayer):
    """Attention and SwiGLU, each after an adaptive norm."""

    def __init__(self, config: DenoisedModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.adaln_attn = AdaptiveNorm(config)
        self.adaln_mlp = AdaptiveNorm(config)

    def forward(self, hidden_states, condition, rotary, attention_mask):
        attended, weights = self.self_attn(self.adaln_attn(hidden_states, condition), rotary, attention_mask)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.adaln_mlp(hidden_states, condition)), weights


class DenoisedModel(StrictLoading):
    """Flow-matching transformer over latents; a row of the batch is a block of chunks that are denoised together."""

    config_class = DenoisedModelConfig
    base_model_prefix = "denoiser"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["DenoiserBlock"]

    def __init__(self, config: DenoisedModelConfig):
        super().__init__(config)
        size, latent = config.hidden_size, config.latent_size
        inputs = 2 * latent if config.self_conditioning else latent
        self.input_proj = nn.Identity() if inputs == size == latent else nn.Linear(inputs, size)
        self.time_mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))
        self.context_proj = self.place_proj = None
        if config.context_size is not None:
            self.context_proj = nn.Linear(config.context_size, size)
            self.place_proj = nn.Linear(size, size, bias=False)
        self.layers = nn.ModuleList([DenoiserBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(size, latent)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "zero_init", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DenoisedModelOutput | tuple:
        """Predicts the clean latents.

        Args:
            latents: noisy x_t, (batch, chunks, latent).
            timesteps: t in [0, 1], 0 = noise, 1 = clean; (batch,), (batch, chunks), or (1,) for the whole batch.
            context: the context's state before each block, (batch, context_size); None predicts without it. Models with
                `context_size` only.
            self_condition: earlier prediction of the clean latents, shaped like `latents`; None means zeros. Models with
                `self_conditioning` only.
            attention_mask: (batch, chunks), 1 = real, 0 = padding.
            output_hidden_states, output_attentions: return hidden states, or attention weights, of all layers; None takes
                the config's value.
            return_dict: False returns a tuple; None takes the config's value.

        Raises:
            ValueError: shapes do not fit, this configuration cannot use an argument, or attention weights are wanted that
                the attention implementation does not compute.
        """
        record = LayerRecord.asked(self.config, output_hidden_states, output_attentions)
        self._check(latents, timesteps, context, self_condition)
        dtype = self.output_proj.weight.dtype
        inputs = latents
        if self.config.self_conditioning:
            earlier = torch.zeros_like(latents) if self_condition is None else self_condition
            inputs = torch.cat([latents, earlier.to(latents)], dim=-1)
        hidden_states = self.input_proj(inputs.to(dtype))
        condition = self._condition(timesteps, context, latents.shape[1], dtype)
        rotary = rotary_embeddings(latents.shape[1], self.config, hidden_states)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        if self.config.causal:
            earlier = torch.ones(latents.shape[1], latents.shape[1], dtype=torch.bool, device=latents.device).tril()
            # Padding sees itself, because a row of attention must not be empty.
            mask = earlier if mask is None else mask & earlier | torch.eye(len(earlier)).to(earlier)
        for layer in self.layers:
            before = hidden_states
            hidden_states, weights = layer(hidden_states, condition, rotary, mask)
            record.add(before, weights)
        hidden_states = self.norm(hidden_states)
        record.end(hidden_states)
        output = DenoisedModelOutput(clean_latents=self.output_proj(hidden_states), **record.fields())
        return as_asked(output, self.config, return_dict)

    def _condition(self, timesteps, context, chunks: int, dtype: torch.dtype) -> torch.Tensor:
        """The condition of the adaptive norms, (batch or 1, chunks or 1, hidden)."""
        size = self.config.hidden_size
        time = sinusoid(timesteps.view(len(timesteps), -1) * self.config.time_scale, size)
        condition = self.time_mlp(time.to(dtype))
        if self.context_proj is None or self.place_proj is None:
            return condition
        place = sinusoid(torch.arange(chunks, device=timesteps.device), size)
        condition = condition + self.place_proj(place.to(dtype))
        if context is None:
            # What training with `context_dropout` reads as a hidden context.
            context = condition.new_zeros(1, self.config.context_size)
        return condition + self.context_proj(context.to(dtype)).unsqueeze(1)

    def _check(self, latents, timesteps, context, self_condition) -> None:
        batch, chunks = latents.shape[:2]
        if tuple(timesteps.shape) not in ((1,), (batch,), (batch, chunks)):
            raise ValueError(
                f"timesteps must be (1,), (batch,) or (batch, chunks) for latents {tuple(latents.shape)}, got "
                f"{tuple(timesteps.shape)}."
            )
        if context is not None and (self.context_proj is None or context.shape != (batch, self.config.context_size)):
            raise ValueError(
                f"context must be (batch, context_size) = ({batch}, {self.config.context_size}), got "
                f"{tuple(context.shape)}; with context_size=None leave it out."
            )
        if self_condition is not None and not self.config.self_conditioning:
            raise ValueError("self_condition is an input of models with self_conditioning=True; leave it out here.")
