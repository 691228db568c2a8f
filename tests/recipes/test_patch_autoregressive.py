"""recipes/benchmarks/patch_autoregressive.py: a causal head inside chunks, its probabilities, and the command."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tests.helpers.recipes import load

PATH = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "patch_autoregressive.py"
WORDS = ["the", "quick", "brown", "fox", "dog", "jumps", "over", "lazy", "old", "house"]


@pytest.fixture(scope="module")
def benchmark():
    return load("patch_autoregressive")


@pytest.fixture(scope="module")
def model(benchmark):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return benchmark.PatchAutoregressive(config, chunk_size=4).eval()


def test_the_loss_is_the_mean_log_probability_of_the_chunks_tokens(benchmark, model):
    ids = torch.randint(20, (3, 14), generator=torch.Generator().manual_seed(1))
    sampler = benchmark.PatchSampler(model)
    for offset in (0, 2):
        told = sampler.log_probs(ids[:, :offset].numpy(), ids[:, None, offset : offset + 12].numpy())
        assert told.shape == (3, 1, 12)
        assert model(ids, offset).item() == pytest.approx(-told.mean(), abs=1e-5)


def test_a_token_sees_those_before_it_and_none_behind(benchmark, model):
    ids = np.random.default_rng(2).integers(0, 20, (1, 12))
    sampler, changed = benchmark.PatchSampler(model), ids.copy()
    changed[0, 9] = (changed[0, 9] + 1) % 20
    before, after = (sampler.log_probs(rows[:, :4], rows[:, None, 4:])[0, 0] for rows in (ids, changed))
    np.testing.assert_allclose(before[:5], after[:5], atol=1e-5)
    assert abs(before[6] - after[6]) > 1e-4


def test_draws_follow_the_told_probabilities(benchmark, model):
    """Frequencies of the second token of a chunk over many draws, which depends on the first one."""
    sampler, prefix = benchmark.PatchSampler(model, batch_size=4096), np.array([[3, 1, 4, 1, 5]])
    drawn = sampler.continuations(prefix, 4096, 2, seed=0)[0]
    assert np.array_equal(drawn, sampler.continuations(prefix, 4096, 2, seed=0)[0])
    pairs = np.stack(np.meshgrid(np.arange(20), np.arange(20), indexing="ij"), -1).reshape(1, -1, 2)
    told = np.exp(sampler.log_probs(prefix, pairs)[0].sum(-1))
    assert told.sum() == pytest.approx(1.0, abs=1e-4)
    counted = np.bincount(drawn[:, 0] * 20 + drawn[:, 1], minlength=400) / len(drawn)
    assert np.abs(counted - told).sum() / 2 < 0.12
    assert sampler.rows(2, 10, seed=1).shape == (2, 10)


@pytest.mark.slow
def test_the_command_learns_and_writes_a_row_of_the_table(benchmark, monkeypatch, tmp_path, capsys):
    draw = random.Random(0)
    text = "\n\n\n".join(" ".join(draw.choice(WORDS) for _ in range(60)) for _ in range(100))
    (tmp_path / "text.txt").write_text(text)
    options = ["--train_file", tmp_path / "text.txt", "--output_dir", tmp_path, "--hidden_size", 32, "--num_layers", 1,
               "--length", 32, "--tokenizer_vocab_size", 280, "--steps", 60, "--warmup_steps", 5, "--num_samples", 5,
               "--num_prefixes", 20, "--prefix_length", 8, "--draws", 2, "--seeds", 0, 1]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(PATH), *map(str, options)])
    benchmark.main()
    result = json.loads((tmp_path / "patch_autoregressive.json").read_text(encoding="utf-8"))
    # 280 tokens alike would be 5.6 nats, ten words alike about 0.7 a token.
    assert result["held_out_nats"] < 3.5 and result["flops"] > 0 and result["tokens"] == 60 * 4 * 32
    assert {"kn_perplexity", "kn_perplexity_held_out", "entropy", "brier_lm_from_probabilities"} <= set(result["row"])
    assert "patch-autoregressive" in capsys.readouterr().out
