"""Layers of the bidirectional transformers: RoPE, grouped-query attention, SwiGLU; shapes are (batch, length, hidden)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half


def rotary_embeddings(length: int, config, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864) for positions 0 … length − 1, (1, length, head_dim) each.

    They are computed in each call, in float32, because a buffer would be left empty by loading through the meta device.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=like.device)
    angles = positions[None, :, None] * config.rope_theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention; a boolean mask (True = may attend) broadcasts to (batch, heads, queries, keys)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(QKᵀ · scaling) V by the attention implementation that `module.config` names.

    Args:
        module: attention layer with `config` and `scaling`.
        query, key, value: (batch, heads, length, head_dim); key and value may have fewer heads.
        attention_mask: boolean, True = may attend, broadcasts to (batch, heads, queries, keys); None: all may.

    Returns:
        (batch, length, heads, head_dim), and the weights (batch, heads, queries, keys) where the implementation computes
        them, else None.
    """
    function: Callable = eager_attention
    if module.config._attn_implementation != "eager":
        function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    return function(module, query, key, value, attention_mask, scaling=module.scaling, dropout=0.0, is_causal=False)


class Attention(nn.Module):
    """Bidirectional grouped-query self-attention with biased q/k/v projections."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output (batch, length, hidden), and the weights where the implementation computes them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        query, key = (heads * cos + rotate_half(heads) * sin for heads in (query, key))
        output, weights = attend(self, query, key, value, attention_mask)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)); also returns attention weights."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), position_embeddings)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


def check_transformer_shape(config) -> None:
    """Raises ValueError where the head counts of a config do not fit its hidden size."""
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        raise ValueError(
            f"hidden_size must be an even multiple of num_attention_heads, got hidden_size={config.hidden_size} and "
            f"num_attention_heads={config.num_attention_heads}."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {config.num_attention_heads} and "
            f"{config.num_key_value_heads}."
        )
