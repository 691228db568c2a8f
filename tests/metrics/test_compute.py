"""Counted training compute against the textbook formula, and baselines of equal size."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf.metrics.compute import (
    count_flops,
    count_training_flops,
    llama_parameters,
    matching_llama_config,
)


def test_a_matrix_product_counts_two_operations_per_multiplication():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    weight = torch.randn(4, 5, requires_grad=True)
    # Only the weight needs a gradient: forward and one backward product.
    assert count_training_flops(lambda: (a @ weight).sum()) == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_step_equals_the_textbook_count(attention):
    batch, length = 2, 16
    config = matching_llama_config(60_000, vocab_size=100, num_layers=2, head_dim=16, max_length=length)
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    ids = torch.randint(100, (batch, length))
    counted = count_training_flops(lambda: model(input_ids=ids, labels=ids).loss)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    products = layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size) + hidden * config.vocab_size
    forward = batch * length * (2 * products + layers * 4 * length * hidden)
    # Rotary tables add a small outer product; the fused attention recomputes the scores in its backward pass.
    assert counted == pytest.approx(3 * forward, rel=0.05)
    assert counted >= 3 * forward


@pytest.mark.parametrize(
    "wanted,vocab", [(300_000, 500), (8_000_000, 2049), (15_000_000, 8193), (120_000_000, 32_000)]
)
def test_matching_llama_has_the_wanted_size(wanted, vocab):
    config = matching_llama_config(wanted, vocab)
    assert llama_parameters(config) == pytest.approx(wanted, rel=0.02)
    if wanted < 1_000_000:
        assert llama_parameters(config) == LlamaForCausalLM(config).num_parameters()


def test_too_few_parameters_for_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="about 10,000 parameters"):
        matching_llama_config(10_000, vocab_size=50_000)
