"""Image fidelity metrics: PSNR, SSIM and multi-scale SSIM; all are differentiable."""

import math

import torch
import torch.nn.functional as F

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(images: torch.Tensor, targets: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio per image in dB, `(batch,)`; infinite for equal images.

    Args:
        images, targets: `(batch, channels, height, width)`; clamp reconstructions to the valid range first.
        data_range: largest minus smallest possible pixel value; 2 for [-1, 1].
    """
    check_pair(images, targets)
    error = (images.float() - targets.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def check_pair(images: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises ValueError unless both are image batches of the same shape."""
    if images.shape != targets.shape or images.ndim != 4:
        raise ValueError(
            "Images and targets must share a shape (batch, channels, height, width), "
            f"got {tuple(images.shape)} and {tuple(targets.shape)}."
        )


def _window(size: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    position = torch.arange(size, device=like.device, dtype=torch.float32) - (size - 1) / 2
    weight = torch.exp(-position.square() / (2 * sigma**2))
    return weight / weight.sum()


def _blur(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    channels, (height, width) = x.shape[1], x.shape[-2:]
    if max(height, width) > 512:
        x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    # Two products with band matrices are several times faster on a CPU than a depthwise convolution.
    return _band(window, height).t() @ x @ _band(window, width)


def _band(window: torch.Tensor, side: int) -> torch.Tensor:
    valid = side - len(window) + 1
    offset = torch.arange(side, device=window.device)[:, None] - torch.arange(valid, device=window.device)
    inside = (offset >= 0) & (offset < len(window))
    return torch.where(inside, window[offset.clamp(0, len(window) - 1)], 0.0)


def _ssim_terms(x: torch.Tensor, y: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    size = min(11, x.shape[-1], x.shape[-2])
    window = _window(size, 1.5, x)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x, var_y = _blur(x * x, window) - mean_x**2, _blur(y * y, window) - mean_y**2
    covariance = _blur(x * y, window) - mean_x * mean_y
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def ssim(images: torch.Tensor, targets: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity per image, `(batch,)` in [-1, 1] (Wang et al. 2004).

    The window is Gaussian, 11 pixels wide with σ 1.5, without padding; smaller images get a smaller window.
    """
    check_pair(images, targets)
    return _ssim_terms(images.float(), targets.float(), data_range)[0]


def ms_ssim(images: torch.Tensor, targets: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Multi-scale structural similarity per image, `(batch,)` in [0, 1] (Wang et al. 2003).

    Five scales need sides of at least 176 pixels; smaller images use fewer scales, with weights rescaled to sum to 1.
    """
    check_pair(images, targets)
    x, y = images.float(), targets.float()
    scales = max(1, min(5, int(math.log2(min(x.shape[-2:]) / 11)) + 1 if min(x.shape[-2:]) >= 11 else 1))
    weights = [weight / sum(SCALE_WEIGHTS[:scales]) for weight in SCALE_WEIGHTS[:scales]]
    result = torch.ones(x.shape[0], device=x.device)
    for scale, weight in enumerate(weights):
        full, contrast = _ssim_terms(x, y, data_range)
        value = full if scale == scales - 1 else contrast
        result = result * value.clamp_min(1e-6) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result
