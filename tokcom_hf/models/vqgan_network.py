"""Convolutional encoder and decoder of `VQGAN` (Esser et al. 2012.09841)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vqgan import VQGANConfig


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups, a number that divides `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv(SiLU(GroupNorm(conv(SiLU(GroupNorm(x)))))) with 3×3 convolutions; a 1×1 shortcut if channels change."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(GradientCheckpointingLayer):
    """x + attention over the positions of a feature map (single head, behind GroupNorm)."""

    def __init__(self, channels: int, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        if self.config._attn_implementation == "eager":
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            h = scores.float().softmax(-1).to(v.dtype) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


def middle(channels: int, config: VQGANConfig) -> list[nn.Module]:
    """Layers at the coarsest resolution: a residual block, and with `mid_attention` attention and a second one."""
    attention = [SpatialAttention(channels, config), ResidualBlock(channels, channels)]
    return [ResidualBlock(channels, channels), *(attention if config.mid_attention else [])]


class Encoder(nn.Module):
    """`(batch, in_channels, height, width)` → `(batch, latent_channels, height / f, width / f)`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multipliers]
        channels = widths[0]
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.in_channels * config.patch_size**2, channels, 3, padding=1),
        ]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        layers += [*middle(channels, config), group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.layers(pixel_values))


class Decoder(nn.Module):
    """`(batch, latent_channels, h, w)` → `(batch, out_channels, h · f, w · f)`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * factor for factor in reversed(config.channel_multipliers)]
        channels = widths[0]
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, channels, 3, padding=1),
            *middle(channels, config),
        ]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)]
        layers += [group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.conv_out = nn.Conv2d(channels, config.out_channels * config.patch_size**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.patch_size)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.unfold(self.conv_out(self.layers(embeddings)))
