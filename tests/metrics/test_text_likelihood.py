"""Probabilities of continuations are those that samplers draw from."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.metrics.text import TextJudge
from tokcom_hf.metrics.text_generation import CausalSampler, KneserNeySampler, TokComSampler
from tokcom_hf.metrics.text_likelihood import causal_log_probs, tokcom_log_probs
from tokcom_hf.metrics.text_ngram import KneserNey
from tokcom_hf.metrics.text_protocol import held_out_prefixes, measure_sampler

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from test_tokcom_training import SHAPE, joint_model

VOCABULARY = 51


@pytest.fixture(scope="module")
def tokcom():
    denoiser = SHAPE | {"attention": "block_causal", "num_context_layers": 2}
    model = joint_model(
        denoiser=denoiser, scale_input=True, token_time_std=1.0, sampler="commit", block_size=1, token_window_size=24,
        token_attention_heads=2, token_mlp_size=48,
    ).eval()  # fmt: skip
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
def test_tokcom_says_how_likely_what_it_draws_is(tokcom, monkeypatch, temperature):
    """Generation is led along given tokens; the distributions it would have drawn from are noted."""
    prefixes, wanted = torch.randint(0, 30, (3, 8)), torch.randint(0, 30, (3, 1, 6))
    noted = []

    def read(hidden, head, heat, generator):
        place = len(noted)
        token = wanted[:, 0, min(place, 5)]
        logits = tokcom.vae._token_logits(hidden, head)[:, 0] / heat
        noted.append(logits.log_softmax(-1)[torch.arange(3), token])
        return token[:, None]

    with monkeypatch.context() as patch:
        patch.setattr(tokcom.vae, "read_tokens", read)
        tokcom.generate(
            prefixes, num_generate_chunks=2, num_steps=4, posterior_temperature=temperature,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
    expected = torch.stack(noted, dim=1)[:, :6]
    assert expected.std() > 0.2
    found = tokcom_log_probs(tokcom, prefixes, wanted, temperature)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-4, rtol=1e-4)
    # Several continuations of a prefix do not see each other.
    twice = tokcom_log_probs(tokcom, prefixes, torch.cat([wanted.flip(-1), wanted], dim=1), temperature)
    torch.testing.assert_close(twice[:, 1:], found, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="whole chunks of 4 tokens, got 6"):
        tokcom_log_probs(tokcom, prefixes[:, :6], wanted)


def test_probabilities_of_all_first_tokens_add_up_to_one(tokcom, causal):
    prefix, every = torch.randint(0, 30, (1, 8)), torch.arange(VOCABULARY)[None, :, None]
    assert float(tokcom_log_probs(tokcom, prefix, every).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(causal_log_probs(causal, prefix, every).exp().sum()) == pytest.approx(1.0, abs=1e-5)


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
    assert TokComSampler(tokcom).log_probs(prefixes, wanted).shape == (2, 1, 4)
    for hides in ({"block_size": 0}, {"num_steps": 2}, {"sampler": "euler"}, {"guidance_scale": 2.0}):
        assert TokComSampler(tokcom, hides).log_probs(prefixes, wanted) is None
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
    for sampler in (TokComSampler(tokcom, batch_size=512), CausalSampler(causal, 0, batch_size=512)):
        row = measure_sampler(sampler, judge, [0], 6, 16, prefixes, draws=64)
        for name in ("brier_1", "brier_2"):
            assert row[name]["mean"] == pytest.approx(row[f"{name}_from_probabilities"]["mean"], abs=1.5)
        assert "brier_lm_error_from_probabilities" in row
    unknown = measure_sampler(TokComSampler(tokcom, {"block_size": 0}), judge, [0], 6, 16, prefixes)
    assert "brier_lm_from_probabilities" not in unknown
