"""Prefixes, samplers and comparisons of the text evaluation."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.metrics.latent_path import sampling_path
from tokcom_hf.metrics.text import KneserNey, TextJudge, detailed_reconstruction
from tokcom_hf.metrics.text_comparison import brier_lm_differences, compare, ratio_at_equal_entropy, ratios_on_frontier
from tokcom_hf.metrics.text_generation import CausalSampler, KneserNeySampler, ShuffledChunkSampler, TokComSampler
from tokcom_hf.metrics.text_protocol import (
    frontier,
    held_out_prefixes,
    measure_sampler,
)

VOCABULARY = 31


@pytest.fixture(scope="module")
def tokcom():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48,
    }  # fmt: skip
    config = TokComConfig(
        vae=shape | {"vocab_size": VOCABULARY, "latent_size": 8}, denoiser=dict(shape), eos_token_id=0, max_chunks=8
    )
    return TokComModel(config).eval()


@pytest.fixture(scope="module")
def samplers(tokcom):
    torch.manual_seed(1)
    causal = LlamaForCausalLM(matching_llama_config(30_000, VOCABULARY, num_layers=1, head_dim=16)).eval()
    train = np.random.default_rng(0).integers(0, VOCABULARY - 1, 800)
    return {
        "tokcom": TokComSampler(tokcom, {"num_steps": 2, "temperature": 1.0}, batch_size=3),
        "causal": CausalSampler(causal, start_id=0, batch_size=3),
        "kneser_ney": KneserNeySampler(KneserNey(train, VOCABULARY, 3)),
        "shuffled": ShuffledChunkSampler(train, 4),
    }


@pytest.mark.parametrize("name", ["tokcom", "causal", "kneser_ney", "shuffled"])
def test_every_sampler_keeps_shapes_and_seeds(samplers, name):
    sampler = samplers[name]
    rows = sampler.rows(5, 16, seed=1)
    assert rows.shape == (5, 16) and rows.min() >= 0 and rows.max() < VOCABULARY
    assert np.array_equal(rows, sampler.rows(5, 16, seed=1))
    assert not np.array_equal(rows, sampler.rows(5, 16, seed=2))
    prefixes = np.random.default_rng(0).integers(0, VOCABULARY - 1, (4, 8))
    state = torch.random.get_rng_state()
    continued = sampler.continuations(prefixes, 2, 6, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert continued.shape == (4, 2, 6)
    assert not np.array_equal(continued[:, 0], continued[:, 1])


def test_causal_continuations_follow_their_own_prefix(samplers):
    greedy = CausalSampler(samplers["causal"].model, start_id=0, temperature=0.0, batch_size=3)
    prefixes = np.random.default_rng(3).integers(0, VOCABULARY - 1, (4, 8))
    both = greedy.continuations(prefixes, 2, 5, seed=0)
    assert np.array_equal(both[:, 0], both[:, 1])
    ids = torch.tensor(prefixes)
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, samplers["causal"].model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert both[:, 0].tolist() == ids[:, 8:].tolist()


def test_tokcom_rows_do_not_stop_at_eos_and_the_setting_survives(tokcom):
    before = tokcom.config.eos_token_id
    rows = TokComSampler(tokcom, {"num_steps": 1, "temperature": 5.0}).rows(40, 32, seed=0)
    after_end = [row[row.tolist().index(0) + 1 :] for row in rows if 0 in row[:16]]
    assert after_end and any(part.any() for part in after_end)
    assert tokcom.config.eos_token_id == before == 0


def test_shuffled_chunks_are_training_chunks():
    train = np.arange(40)
    rows = ShuffledChunkSampler(train, 4).rows(3, 8, seed=0).reshape(-1, 4)
    assert (rows[:, 0] % 4 == 0).all() and (np.diff(rows, axis=1) == 1).all()


def test_prefixes_are_followed_by_their_true_continuation():
    tokens = np.arange(100)
    prefixes, targets = held_out_prefixes(tokens, 10, prefix_length=8)
    assert prefixes.shape == (10, 8) and targets.shape == (10, 4)
    assert (targets[:, 0] == prefixes[:, -1] + 1).all() and targets[-1, -1] == 99 and prefixes[0, 0] == 0
    assert len(held_out_prefixes(tokens[:14], 10, 8)[0]) == 3
    with pytest.raises(ValueError, match="need 12"):
        held_out_prefixes(tokens[:11], 10, 8)


def test_measured_rows_hold_mean_and_spread_and_the_frontier_its_settings(samplers):
    generator = np.random.default_rng(5)
    judge = TextJudge(generator.integers(0, VOCABULARY, 2000), generator.integers(0, VOCABULARY, (20, 16)), VOCABULARY)
    prefixes = held_out_prefixes(judge.reference.reshape(-1), 6, 8)
    row = measure_sampler(samplers["tokcom"], judge, [0, 1], 6, 16, prefixes, continuation_length=8)
    assert {"brier_lm", "kn_perplexity", "entropy", "auc", "overlap_8", "tokens_per_second"} <= set(row)
    assert row["kn_perplexity"]["std"] > 0 and row["tokens"]["mean"] == 96
    settings = [{"temperature": 1e-3}, {"temperature": 2.0}]
    causal = samplers["causal"].model
    points = frontier(lambda **point: CausalSampler(causal, 0, **point), settings, judge, 6, 16)
    assert [point["temperature"] for point in points] == [1e-3, 2.0]
    assert points[0]["entropy"] < points[1]["entropy"]


def test_ratio_is_taken_only_at_equal_entropy():
    baseline = {"entropy": 5.0, "kn_perplexity": 100.0}
    points = [
        {"entropy": 4.0, "kn_perplexity": 10.0},
        {"entropy": 4.95, "kn_perplexity": 150.0},
        {"entropy": 5.08, "kn_perplexity": 130.0},
    ]
    assert ratio_at_equal_entropy(points, baseline, key="kn_perplexity")["ratio"] == pytest.approx(1.3)
    assert ratio_at_equal_entropy(points[:1], baseline, key="kn_perplexity") is None


def test_tokcom_is_also_compared_with_the_curve_between_a_baselines_points():
    """At the same entropy, where within 0.1 nats of a point a lower entropy alone would look better."""
    point = lambda entropy, perplexity, **more: {  # noqa: E731
        "entropy": entropy, "kn_perplexity": perplexity, "kn_perplexity_held_out": 2 * perplexity, **more,
    }  # fmt: skip
    curves = {
        "TokCom": [point(5.5, 100.0, temperature=1.0, num_steps=4)],
        "autoregressive": [point(5.0, 50.0, temperature=0.9), point(5.58, 120.0, temperature=1.0)],
    }
    text = {"overlap_8": {"mean": 0.0}}
    found = compare({"held-out text": text, "TokCom, 4 steps": text}, curves, ["autoregressive"])
    ((entropy, ratio),) = found["on_the_baselines_curve"]["autoregressive, train scorer"]
    assert entropy == 5.5 and ratio == pytest.approx(100 / (50 * 2.4 ** (0.5 / 0.58)))
    near = found["equal_entropy"]["autoregressive at temperature 1 (entropy 5.58)"]["train"]["ratio"]
    assert near == pytest.approx(100 / 120) and near < ratio
    assert any("curve interpolated" in line for line in found["lines"])


def test_ratios_on_a_frontier_are_taken_at_equal_entropy():
    reference = [{"entropy": 5.5, "kn_perplexity": 400.0}, {"entropy": 5.1, "kn_perplexity": 100.0}]
    points = [{"entropy": entropy, "kn_perplexity": 220.0} for entropy in (5.0, 5.3, 5.5, 5.6)]
    assert ratios_on_frontier(points, reference, "kn_perplexity") == [
        (5.3, pytest.approx(1.1)),
        (5.5, pytest.approx(0.55)),
    ]
    assert ratios_on_frontier(points, reference[:1], "kn_perplexity") == []


def test_the_sampling_path_starts_at_the_noise(tokcom):
    path = sampling_path(tokcom, batch_size=16, num_chunks=8, num_steps=4)
    assert path["t"] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert path["rms"][0] == pytest.approx(tokcom.config.noise_std, rel=0.1)
    # The last Euler step lands on the prediction.
    assert path["rms"][-1] == pytest.approx(path["predicted_rms"][-1])


def test_detailed_reconstruction_reports_every_number(tokcom):
    ids = torch.randint(VOCABULARY - 1, (4, 32))
    result = detailed_reconstruction(tokcom.vae, ids, torch.ones_like(ids), torch.ones(VOCABULARY), (0.0, 0.5))
    # Every token is rare here, so both accuracies are the same one.
    assert result["rare_token_accuracy"] == pytest.approx(result["token_accuracy"])
    assert result["rare_token_share"] == 1.0 and 0 <= result["sequence_accuracy"] <= result["chunk_accuracy"] <= 1
    assert {"token_accuracy_sigma_0.5", "random_chunk_accuracy", "active_dimensions"} <= set(result)


def test_differences_are_tokcoms_own_row_against_each_baseline_that_knows_its_probabilities():
    generator = np.random.default_rng(0)
    base = generator.random((50, 4))
    scores = {
        "unigram": [], "TokCom, 4 steps": [base + 0.1, base + 0.3], "TokCom, block 4": [],
        "autoregressive a": [base], "autoregressive b": [base + 0.2], "autoregressive greedy": [],
    }  # fmt: skip
    found = brier_lm_differences(scores)
    assert set(found) == {"autoregressive a", "autoregressive b"}
    assert found["autoregressive a"]["difference"] == pytest.approx(20.0, abs=0.1)
    assert found["autoregressive b"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert brier_lm_differences({"TokCom, 4 steps": [], "autoregressive a": [base]}) == {}
