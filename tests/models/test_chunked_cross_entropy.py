"""The chunked loss equals the plain one in value and gradients, and holds no vocabulary-wide tensor."""

import pytest
import torch

from tokcom_hf.models import shared_cross_entropy as module
from tokcom_hf.models.shared_cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits_at_once", [1, 70, 2**24])
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, bias, logits_at_once):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    inputs = [torch.randn(11, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)]
    inputs += [torch.randn(30, dtype=torch.float64)] if bias else []
    for tensor in inputs:
        tensor.requires_grad_(True)
    labels = torch.randint(30, (11,))
    labels[[2, 5]] = -100
    ours = chunked_cross_entropy(inputs[0], inputs[1], labels, inputs[2] if bias else None)
    plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*inputs), labels)
    torch.testing.assert_close(ours.double(), plain, atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8)
    chunked_cross_entropy(hidden, weight, torch.randint(30, (4,))).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_no_labels_give_zero():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(30, 8), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0
