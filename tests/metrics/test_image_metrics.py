"""Image metrics against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from tokcom_hf.metrics.image import _blur, _window, ms_ssim, psnr, ssim
from tokcom_hf.trainers.vqgan_perceptual import build_perceptual_loss


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 8, 8)
    assert psnr(images + 0.2, images) == pytest.approx([20.0, 20.0], abs=1e-4)
    assert torch.isinf(psnr(images, images)).all()
    with pytest.raises(ValueError, match="share a shape"):
        psnr(images, images[:, :1])


def test_blur_is_the_separable_convolution():
    x, window = torch.randn(2, 3, 20, 30), _window(11, 1.5, torch.zeros(1))
    kernel = torch.outer(window, window).expand(3, 1, 11, 11)
    torch.testing.assert_close(_blur(x, window), F.conv2d(x, kernel, groups=3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [8, 32, 64, 192])
def test_similarity_is_one_for_equal_images_and_falls_with_noise(size):
    images = torch.rand(2, 3, size, size) * 2 - 1
    for metric in (ssim, ms_ssim):
        values = [metric(images + noise * torch.randn_like(images), images).mean() for noise in (0.0, 0.1, 0.5)]
        assert values[0] == pytest.approx(1.0, abs=1e-4) and values[0] > values[1] > values[2]


@pytest.mark.parametrize("name", ["pyramid", "random"])
def test_perceptual_losses_vanish_on_equality_and_have_gradients(name):
    loss = build_perceptual_loss(name)
    images = torch.rand(2, 3, 32, 32)
    other = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    assert loss(images, images).abs() < 1e-4 and loss(other, images) > 1e-3
    (gradient,) = torch.autograd.grad(loss(other, images), other)
    assert gradient.abs().sum() > 0


def test_unknown_perceptual_loss_is_refused():
    assert build_perceptual_loss("none") is None
    with pytest.raises(ValueError, match="backbone"):
        build_perceptual_loss("vgg")
