"""Perceptual losses of reconstructed images; `pyramid` and `random` need no download.

`pyramid`: 1 − MS-SSIM plus the distance of image gradients at three scales. `random`: distance of the features of a random
convolution network. `backbone:<name or folder>`: feature distance of a vision model loaded by transformers (`AutoModel`), or
by timm with `backbone:timm:<name>`. `lpips`: LPIPS, if the package `lpips` is installed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tokcom_hf.metrics.image import ms_ssim


class PyramidLoss(nn.Module):
    """1 − MS-SSIM plus the L1 distance of image gradients at three scales."""

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = 1 - ms_ssim(images, targets).mean()
        x, y = images.float(), targets.float()
        for _ in range(3):
            difference = x - y
            loss = loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
            if min(x.shape[-2:]) < 4:
                break
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return loss


class RandomFeatureLoss(nn.Module):
    """Mean squared distance of unit-length features of a random convolution network with fixed weights."""

    def __init__(self, channels: int = 3, width: int = 32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [channels, width, 2 * width, 4 * width]
        for layer, (size_in, size_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            weight = torch.randn(size_out, size_in, 3, 3, generator=generator) * (2 / (9 * size_in)) ** 0.5
            self.register_buffer(f"weight{layer}", weight, persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps, each `(batch, width, h, w)` with unit length per position."""
        maps = []
        for layer in range(3):
            x = F.leaky_relu(
                F.conv2d(x, getattr(self, f"weight{layer}"), padding=1, stride=1 if layer == 0 else 2), 0.2
            )
            maps.append(F.normalize(x, dim=1))
        return maps

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.features(images.float()), self.features(targets.float()), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


class BackboneLoss(nn.Module):
    """Mean squared distance of the hidden states of a frozen pretrained vision model."""

    def __init__(self, name: str):
        super().__init__()
        if name.startswith("timm:"):
            import timm

            self.model = timm.create_model(name.removeprefix("timm:"), pretrained=True, features_only=True)
            self.size = None
        else:
            from transformers import AutoModel

            self.model = AutoModel.from_pretrained(name)
            self.model = getattr(self.model, "vision_model", self.model)
            self.size = getattr(self.model.config, "image_size", None)
        self.timm = name.startswith("timm:")
        self.model.eval().requires_grad_(False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of every layer; images are first resized to the backbone's `image_size` if it has one."""
        if self.size is not None:
            size = self.size if isinstance(self.size, int) else tuple(self.size)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        if self.timm:
            return self.model(x)
        return list(self.model(pixel_values=x, output_hidden_states=True).hidden_states)

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if images.shape[1] != 3:
            images, targets = (x[:, :1].expand(-1, 3, -1, -1) for x in (images, targets))
        pairs = zip(self.features(images.float()), self.features(targets.float()), strict=True)
        return torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()


def build_perceptual_loss(name: str, channels: int = 3) -> nn.Module | None:
    """The perceptual loss of that name (see the docstring of this file), or None for `none`.

    Raises:
        ValueError: the name is unknown.
        ImportError: a package that the loss needs is missing.
    """
    if name == "none":
        return None
    if name == "pyramid":
        return PyramidLoss()
    if name == "random":
        return RandomFeatureLoss(channels).requires_grad_(False)
    if name.startswith("backbone:"):
        return BackboneLoss(name.removeprefix("backbone:"))
    if name == "lpips":
        try:
            import lpips
        except ImportError as error:
            raise ImportError("perceptual='lpips' needs the package lpips: pip install lpips") from error
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    raise ValueError(f"perceptual must be none, pyramid, random, lpips or backbone:<name>, got {name!r}.")
