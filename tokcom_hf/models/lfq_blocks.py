"""Transformer of `LFQQuantizer`: pre-norm blocks that attend within an image, with 2-D rotary positions.

Sources: rotary positions in two dimensions 2403.13298, normalised queries and keys 2010.04245.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .configuration_lfq_quantizer import LFQConfig
from .shared_layers import eager_attention

NORM_EPS = 1e-6


def rotary_2d(grid: tuple[int, int], head_dim: int, theta: float, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `(1, rows · columns, head_dim)` of the rotary positions of features in reading order.

    The first half of the pairs rotates with the row, the second half with the column. cos and sin are computed in each call,
    because `from_pretrained` would leave a non-persistent buffer uninitialised.
    """
    quarter = head_dim // 4
    frequencies = theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequencies for size in grid)
    by_row = rows[:, None].expand(-1, grid[1], -1)
    by_column = columns[None].expand(grid[0], -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).reshape(1, grid[0] * grid[1], -1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class LFQAttention(nn.Module):
    """Bidirectional self-attention over the features of an image."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        norm = lambda: nn.RMSNorm(self.head_dim, eps=NORM_EPS) if config.qk_norm else nn.Identity()  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, hidden_states: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        query, key, value = self.qkv_proj(hidden_states).view(batch, length, 3, -1, self.head_dim).unbind(2)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *positions)
        attend: Callable = eager_attention
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self, query, key, value.transpose(1, 2), None, scaling=self.scaling, dropout=0.0, is_causal=False
        )
        return self.o_proj(output.reshape(batch, length, -1))


class LFQBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attention = LFQAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, hidden_states: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), positions)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
