"""DenoisedModel: a transformer that predicts clean latents from noisy ones, conditioned on time by adaLN-Zero.

Each block normalises with RMSNorm(h) · (1 + scale(t)) + shift(t) before attention and before the MLP; scale and shift
come from zero-initialised linear maps of the time embedding (DiT, arXiv 2212.09748).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_tokcom_denoiser import DenoisedModelConfig
from .context_encoder import ContextEncoder, FinishedChunks
from .layer_outputs import LayerRecord, as_asked
from .layers import Attention, KeyValue, SwiGLU, rotary_embeddings
from .strict_loading import StrictLoading
from .token_window import chunk_before

# Per layer, what `DenoiserBlock.modulation` returns.
Modulations = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class DenoisedModelOutput(ModelOutput):
    """clean_latents: (batch, chunks, latent); key_values: per layer, (key, value) of the positions given; token_hidden:
    (batch, chunks, chunk_size, hidden) where `TokComModel` predicts tokens; hidden_states: with `output_hidden_states`,
    (batch, chunks, hidden) before the first layer and behind each, the last one normalised; attentions: with
    `output_attentions`, (batch, heads, chunks, keys) of each layer, keys being those of the prefix and of all inputs."""

    clean_latents: torch.FloatTensor | None = None
    key_values: list[KeyValue] | None = None
    token_hidden: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def time_sinusoid(t: torch.Tensor, size: int, max_period: float) -> torch.Tensor:
    """t (…) → (…, size) float32: cosines first, then sines, frequencies max_period^(−i / half)."""
    half = size // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AdaptiveNorm(nn.Module):
    """RMSNorm(h) · (1 + scale) + shift with scale and shift from SiLU → Linear of the time embedding."""

    def __init__(self, config: DenoisedModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.scale_shift_mlp = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))
        # adaLN-Zero: a new block normalises as if unconditioned.
        self.scale_shift_mlp[1].zero_init = True

    def forward(self, hidden_states: torch.Tensor, scale_shift: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """`scale_shift` (times, 2 · hidden): a row per distinct t; `which` (batch or 1, length or 1): a position's row."""
        scale, shift = nn.functional.embedding(which, scale_shift).chunk(2, dim=-1)
        return self.norm(hidden_states) * (1 + scale) + shift


class DenoiserBlock(GradientCheckpointingLayer):
    """Attention and SwiGLU, each behind an adaptive norm."""

    def __init__(self, config: DenoisedModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.adaln_attn = AdaptiveNorm(config)
        self.adaln_mlp = AdaptiveNorm(config)

    def modulation(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Time embeddings (times, hidden) → scale and shift of the two norms, (times, 2 · hidden) each."""
        return self.adaln_attn.scale_shift_mlp(time), self.adaln_mlp.scale_shift_mlp(time)

    def forward(self, hidden_states, time, which, rotary, attention_mask, prefix):
        """time: embeddings (times, hidden), or what `modulation` made of them."""
        first, second = self.modulation(time) if torch.is_tensor(time) else time
        attended, key_value, weights = self.self_attn(
            self.adaln_attn(hidden_states, first, which), rotary, attention_mask, prefix
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.adaln_mlp(hidden_states, second, which)), key_value, weights


class DenoisedModel(StrictLoading):
    """Flow-matching transformer over latents."""

    config_class = DenoisedModelConfig
    base_model_prefix = "denoiser"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["DenoiserBlock", "Block"]

    def __init__(self, config: DenoisedModelConfig):
        super().__init__(config)
        size, latent = config.hidden_size, config.latent_size
        inputs = 2 * latent if config.self_conditioning else latent
        self.input_proj = nn.Identity() if inputs == size == latent else nn.Linear(inputs, size)
        self.time_mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))
        self.context_encoder = ContextEncoder(config) if config.num_context_layers else None
        self.state_proj = nn.Linear(size, size) if config.num_context_layers else None
        self.layers = nn.ModuleList([DenoiserBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(size, config.output_size or latent)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "zero_init", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        self_condition: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        block_index: torch.LongTensor | None = None,
        past_key_values: FinishedChunks | None = None,
        position_offset: int = 0,
        return_key_values: bool = False,
        modulations: Modulations | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DenoisedModelOutput | tuple:
        """Predicts the clean latents.

        Args:
            latents: noisy x_t, (batch, chunks, latent).
            timesteps: (batch,), (batch, chunks), or with `block_index` (batch, blocks); 0 = noise, 1 = clean; (1,) where it
                is one for the whole batch.
            self_condition: earlier prediction of the clean latents, same shape as `latents`; None means zeros.
            attention_mask: (batch, prefix + chunks), 1 = real, 0 = padding.
            context: clean latents (batch, chunks, latent) of the same positions. Training of `block_causal` models: block b
                of `latents` sees itself and the clean blocks before b. With a context encoder `latents` may hold several
                noisy copies of each row, one after the other: (copies · batch, chunks, latent).
            block_index: (chunks,) block number of each position, rising from 0; needed with `context`.
            past_key_values: what `finish` returned for the chunks before.
            position_offset: position of the first latent.
            modulations: what `modulation` made of `timesteps`, where they are (1,): saves computing it again.
            output_hidden_states, output_attentions: also return those of all layers; None takes the config's.
            return_dict: False returns a tuple; None takes the config's.

        Raises:
            ValueError: the shape of `timesteps` fits neither, or attention weights that are not computed.
        """
        record = LayerRecord.asked(self.config, output_hidden_states, output_attentions)
        chunks, device = latents.shape[1], latents.device
        dtype = self.output_proj.weight.dtype
        times = timesteps.view(len(timesteps), -1)
        groups = None
        if times.shape[1] > 1:
            groups = torch.arange(chunks, device=device) if times.shape[1] == chunks else block_index
            if groups is None or len(groups) != chunks or int(groups[-1]) >= times.shape[1]:
                raise ValueError(
                    f"timesteps must be (batch,), (batch, chunks) or, with block_index, (batch, blocks); got "
                    f"{times.shape[1]} timesteps for {chunks} chunks."
                )
        positions = torch.arange(position_offset, position_offset + chunks, device=device)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        inputs = latents
        if context is not None:
            if block_index is None:
                block_index = torch.zeros(chunks, dtype=torch.long, device=device)
            structure = block_mask(block_index)
            if self.context_encoder is not None:
                # Clean chunks come as a prefix of keys: [clean, noisy] instead of [noisy, clean].
                structure = structure[..., :chunks, :].roll(chunks, dims=-1)
            else:
                if groups is None:
                    groups = torch.zeros(chunks, dtype=torch.long, device=device)
                groups = torch.cat([groups, groups.new_full((chunks,), times.shape[1])])
                times = torch.cat([times, times.new_ones(len(times), 1)], dim=1)
                positions = positions.repeat(2)
                inputs = torch.cat([latents, context], dim=1)
            mask = structure if mask is None else structure & torch.cat([mask, mask], dim=-1)
            # A padded query must see something, or its softmax is empty.
            itself = torch.eye(inputs.shape[1], dtype=torch.bool, device=device)
            mask = mask | nn.functional.pad(itself, (2 * chunks - inputs.shape[1], 0))
        if self.config.self_conditioning:
            condition = torch.zeros_like(inputs)
            if self_condition is not None:
                condition[:, :chunks] = self_condition
            inputs = torch.cat([inputs, condition], dim=-1)
        hidden_states = self.input_proj(inputs.to(dtype))
        rotary = self._rotary(positions, dtype)
        prefixes: list[KeyValue] | None = None if past_key_values is None else past_key_values.layers
        if self.context_encoder is not None and self.state_proj is not None:
            states, last = None, None if past_key_values is None else past_key_values.state
            if context is not None:
                copies = len(latents) // len(context)
                real = None if attention_mask is None else attention_mask[::copies]
                states, _ = self.context_encoder(context, position_offset, real)
                keys = (layer.self_attn.key_value(states, rotary) for layer in self.layers)
                prefixes = [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in keys]
                states = states.repeat_interleave(copies, 0).unsqueeze(2)
            # Only a chunk right behind a finished one has a state to start from; zeros stand for the others'.
            before = chunk_before(
                torch.zeros_like(hidden_states).unsqueeze(2), None if last is None else last.unsqueeze(2), states,
                block_index, attention_mask,
            )  # fmt: skip
            hidden_states = hidden_states + self.state_proj(before.squeeze(2))
        if times.numel() == 1:
            distinct, which = times.view(1), torch.zeros_like(times, dtype=torch.long)
        else:
            # Many chunks have the same time, and an embedding costs as much as half of a layer.
            distinct, which = times.unique(return_inverse=True)
        which = which if groups is None else which[:, groups]
        time = self._time(distinct) if modulations is None else None
        key_values: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            prefix = None if prefixes is None else prefixes[index]
            condition = time if modulations is None else modulations[index]
            before = hidden_states[:, :chunks]
            hidden_states, key_value, weights = layer(hidden_states, condition, which, rotary, mask, prefix)
            record.add(before, None if weights is None else weights[:, :, :chunks])
            if return_key_values:
                key_values.append(key_value)
        hidden_states = self.norm(hidden_states[:, :chunks])
        record.end(hidden_states)
        output = DenoisedModelOutput(
            clean_latents=self.output_proj(hidden_states), key_values=key_values or None, **record.fields()
        )
        return as_asked(output, self.config, return_dict)

    def _time(self, times: torch.Tensor) -> torch.Tensor:
        """t (times,) → embeddings (times, hidden)."""
        size, period = self.config.hidden_size, float(self.config.time_max_period)
        sinusoid = time_sinusoid(times * self.config.time_scale, size, period)
        return self.time_mlp(sinusoid.to(self.output_proj.weight.dtype))

    def modulation(self, timesteps: torch.Tensor) -> Modulations:
        """All that the layers are told of `timesteps` (1,), for `forward`: a sampler meets the same t in every block."""
        time = self._time(timesteps)
        return [layer.modulation(time) for layer in self.layers]

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> KeyValue:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return rotary_embeddings(positions.unsqueeze(0), head_dim, self.config.rope_theta, dtype)

    def finish(
        self,
        latents: torch.Tensor,
        past: FinishedChunks | None = None,
        position_offset: int = 0,
        attention_mask: torch.Tensor | None = None,
    ) -> FinishedChunks:
        """What later chunks need of clean ones, (batch, chunks, latent), behind those of `past`.

        attention_mask: (batch, position_offset + chunks), 1 = real, 0 = padding. Only for `block_causal` models.
        """
        if self.context_encoder is None:
            keys = self(
                latents, latents.new_ones(1), None, attention_mask, past_key_values=past, position_offset=position_offset,
                return_key_values=True, return_dict=True,
            ).key_values  # fmt: skip
            new = FinishedChunks(keys, [])
        else:
            states, encoder = self.context_encoder(
                latents, position_offset, attention_mask, None if past is None else past.encoder
            )
            positions = torch.arange(position_offset, position_offset + latents.shape[1], device=latents.device)
            rotary = self._rotary(positions, states.dtype)
            new = FinishedChunks(
                [layer.self_attn.key_value(states, rotary) for layer in self.layers], encoder, states[:, -1:]
            )
        return new if past is None else past.extended(new)


def block_mask(block_index: torch.LongTensor) -> torch.Tensor:
    """Which of [noisy, clean] may see which: (1, 1, 2 · chunks, 2 · chunks), True = may attend.

    A noisy position sees its own noisy block and the clean blocks before it; a clean position sees the clean blocks up
    to its own (block diffusion, arXiv 2503.09573).
    """
    row, column = block_index[:, None], block_index[None, :]
    noisy = torch.cat([row == column, column < row], dim=1)
    clean = torch.cat([torch.zeros_like(row == column), column <= row], dim=1)
    return torch.cat([noisy, clean], dim=0)[None, None]
