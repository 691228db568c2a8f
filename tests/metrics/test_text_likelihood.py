"""Probabilities of continuations are those that samplers draw from."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.evaluation.text_generation import CausalSampler, HeadSampler, KneserNeySampler, TokComSampler
from tokcom_hf.evaluation.text_likelihood import causal_log_probs, head_log_probs, head_losses, mean_next_token_loss
from tokcom_hf.evaluation.text_protocol import SamplingPlan, held_out_prefixes, measure_sampler
from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.metrics.text import TextJudge
from tokcom_hf.metrics.text_ngram import KneserNey

VOCABULARY = 51


@pytest.fixture(scope="module")
def tokcom():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48,
    }  # fmt: skip
    config = TokComConfig(
        vae=shape | {"vocab_size": VOCABULARY + 1, "latent_size": 8}, denoiser=dict(shape), context=dict(shape),
        noise_std=1.0, block_sizes=[1], block_size=1, num_steps=2, max_chunks=8,
    )  # fmt: skip
    model = TokComModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(1)
    model = LlamaForCausalLM(matching_llama_config(30_000, VOCABULARY, num_layers=1, head_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_heads_alone_draw_what_they_say(tokcom, temperature):
    """Token by token over two chunks: the second chunk's heads have read the first."""
    sampler, prefix = HeadSampler(tokcom, temperature, batch_size=4096), np.array([[3, 1, 4, 1, 5]])
    drawn = sampler.continuations(prefix, 4096, 6, seed=0)
    assert np.array_equal(drawn, sampler.continuations(prefix, 4096, 6, seed=0))
    told = np.exp(sampler.log_probs(prefix, np.arange(VOCABULARY)[None, :, None])[0, :, 0])
    assert told.sum() == pytest.approx(1.0, abs=1e-4)
    counted = np.bincount(drawn[0, :, 0], minlength=VOCABULARY) / 4096
    assert np.abs(counted - told).sum() / 2 < 0.06
    # One reading of prefix and continuation together.
    some = torch.as_tensor(drawn[:, :5])
    ids = torch.cat([torch.tensor(prefix).expand(5, -1), some[0]], dim=1)
    with torch.no_grad():
        scores = head_log_probs(tokcom, tokcom.context(ids)[:, [5, 9]], temperature).flatten(1, 2)[:, :6]
    expected = scores.gather(-1, some[0][..., None])[..., 0]
    np.testing.assert_allclose(sampler.log_probs(prefix, some.numpy())[0], expected.numpy(), atol=1e-4)


def test_tokens_of_a_chunk_are_independent_under_the_heads_alone(tokcom):
    prefix, pair = np.ones((1, 8), dtype=np.int64), np.array([[[7, 2], [9, 2]]])
    told = HeadSampler(tokcom).log_probs(prefix, pair)[0]
    assert told[0, 1] == pytest.approx(told[1, 1], abs=1e-5) and told[0, 0] != told[1, 0]


def test_head_losses_are_their_mean_log_probabilities(tokcom):
    rows = np.random.default_rng(3).integers(0, VOCABULARY, (5, 18))
    sampler = HeadSampler(tokcom)
    told = np.concatenate(
        [sampler.log_probs(rows[:, :begin], rows[:, None, begin : begin + 4])[:, 0] for begin in (0, 4, 8, 12)]
    )
    np.testing.assert_allclose(head_losses(tokcom, rows, batch_size=2), -told.mean(axis=0), atol=1e-4)


def test_the_next_token_loss_of_a_baseline_leaves_out_the_first_token(causal):
    rows = np.random.default_rng(4).integers(0, VOCABULARY, (3, 8))
    told = causal_log_probs(causal, torch.tensor(rows[:, :1]), torch.tensor(rows[:, None, 1:]))
    assert mean_next_token_loss(causal, rows, batch_size=2) == pytest.approx(-told.mean().item(), abs=1e-5)


def test_causal_probabilities_are_those_of_the_whole_text(causal):
    prefixes, wanted = torch.randint(0, 30, (3, 8)), torch.randint(0, 30, (3, 2, 5))
    found = causal_log_probs(causal, prefixes, wanted, 0.8)
    for draw in range(2):
        ids = torch.cat([prefixes, wanted[:, draw]], dim=1)
        with torch.no_grad():
            logits = causal(ids).logits[:, 7:-1] / 0.8
        expected = logits.log_softmax(-1).gather(-1, wanted[:, draw, :, None])[..., 0]
        torch.testing.assert_close(found[:, draw], expected, atol=1e-5, rtol=1e-5)


def test_samplers_without_known_probabilities_say_so(tokcom, causal):
    prefixes, wanted = np.ones((2, 8), dtype=np.int64), np.ones((2, 1, 4), dtype=np.int64)
    assert TokComSampler(tokcom).log_probs(prefixes, wanted) is None
    assert TokComSampler(tokcom).scored_continuations(prefixes, wanted[:, 0], 2, 4, seed=0)[1] is None
    assert CausalSampler(causal, 0, temperature=0.0).log_probs(prefixes, wanted) is None
    assert KneserNeySampler(KneserNey(np.arange(30), VOCABULARY, 2)).log_probs(prefixes, wanted) is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_baseline_scores_what_it_draws_in_one_reading(causal, temperature):
    sampler = CausalSampler(causal, 0, temperature, batch_size=8)
    generator = np.random.default_rng(6)
    prefixes, targets = generator.integers(0, 30, (11, 6)), generator.integers(0, 30, (11, 3))
    read: list[int] = []
    hook = causal.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    drawn, log_probs = sampler.scored_continuations(prefixes, targets, 2, 5, seed=7)
    hook.remove()
    assert read.count(6) == 3 and set(read) == {1, 6}
    np.testing.assert_array_equal(drawn, sampler.continuations(prefixes, 2, 5, seed=7))
    expected = sampler.log_probs(prefixes, np.concatenate([targets[:, None], drawn[..., :3]], axis=1))
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    assert CausalSampler(causal, 0, 0.0).scored_continuations(prefixes, targets, 2, 5, seed=7)[1] is None


def test_both_estimates_of_brier_lm_agree(tokcom, causal):
    """Over many draws: the error of a mean is about 0.5, mostly of the samples that agree or not."""
    generator = np.random.default_rng(5)
    judge = TextJudge(generator.integers(0, 30, 2000), generator.integers(0, 30, (20, 16)), VOCABULARY)
    prefixes = held_out_prefixes(judge.reference.reshape(-1), 160, 8)
    for sampler in (HeadSampler(tokcom, batch_size=512), CausalSampler(causal, 0, batch_size=512)):
        row = measure_sampler(sampler, judge, [0], SamplingPlan(6, 16, prefixes, 64))
        for name in ("brier_1", "brier_2"):
            assert row[name]["mean"] == pytest.approx(row[f"{name}_from_probabilities"]["mean"], abs=1.5)
        assert "brier_lm_error_from_probabilities" in row
    scores: list[np.ndarray] = []
    unknown = measure_sampler(
        TokComSampler(tokcom, {"block_size": 0}), judge, [0], SamplingPlan(6, 16, prefixes), scores
    )
    assert 100 * scores[0].mean(axis=0)[0] == pytest.approx(unknown["brier_1"]["mean"])
    assert "brier_lm_from_probabilities" not in unknown
