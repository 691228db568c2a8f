"""Prefixes, samplers and comparisons of the text evaluation."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.evaluation.text_comparison import (
    brier_lm_differences,
    compare,
    difference_line,
    ratio_at_equal_entropy,
    ratios_on_frontier,
)
from tokcom_hf.evaluation.text_generation import (
    CausalSampler,
    HeadSampler,
    KneserNeySampler,
    ShuffledChunkSampler,
    TokComSampler,
    tokens_behind_prefix,
)
from tokcom_hf.evaluation.text_protocol import (
    SamplingPlan,
    frontier,
    held_out_prefixes,
    measure_sampler,
)
from tokcom_hf.evaluation.tokcom_denoising import BlockDenoiser, denoising_metrics
from tokcom_hf.evaluation.tokcom_latent_path import sampling_path
from tokcom_hf.evaluation.tokcom_reconstruction import detailed_reconstruction
from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.metrics.text import KneserNey, TextJudge
from tokcom_hf.metrics.text_brier import brier_summary
from tokcom_hf.plots.text import setting_name

VOCABULARY = 31


@pytest.fixture(scope="module")
def tokcom():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48,
    }  # fmt: skip
    config = TokComConfig(
        vae=shape | {"vocab_size": VOCABULARY, "latent_size": 8}, denoiser=dict(shape), context=dict(shape), eos_token_id=0,
        max_chunks=8, noise_std=1.0, block_sizes=[1, 2], block_size=2, num_steps=2,
    )  # fmt: skip
    model = TokComModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def samplers(tokcom):
    torch.manual_seed(1)
    causal = LlamaForCausalLM(matching_llama_config(30_000, VOCABULARY, num_layers=1, head_dim=16)).eval()
    train = np.random.default_rng(0).integers(0, VOCABULARY - 1, 800)
    return {
        "tokcom": TokComSampler(tokcom, {"num_steps": 3, "temperature": 1.0, "sampler": None}, batch_size=3),
        "heads": HeadSampler(tokcom, batch_size=3),
        "causal": CausalSampler(causal, start_id=0, batch_size=3),
        "kneser_ney": KneserNeySampler(KneserNey(train, VOCABULARY, 3)),
        "shuffled": ShuffledChunkSampler(train, 4),
    }


@pytest.mark.parametrize("name", ["tokcom", "heads", "causal", "kneser_ney", "shuffled"])
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
    rows = TokComSampler(tokcom, {"num_steps": 1, "temperature": 5.0}).rows(200, 32, seed=0)
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
    plan = SamplingPlan(6, 16, held_out_prefixes(judge.reference.reshape(-1), 6, 8), draws=3)
    scores: list[np.ndarray] = []
    more = lambda rows: {"largest": float(rows.max())}  # noqa: E731
    row = measure_sampler(samplers["tokcom"], judge, [0, 1], plan, scores, more)
    assert {"brier_lm", "kn_perplexity", "entropy", "auc", "overlap_8", "tokens_per_second", "largest"} <= set(row)
    assert row["distinct_rows"]["mean"] == 6 and [part.shape for part in scores] == [(6, 4)] * 2
    # One score of all draws: not the mean of the seeds', each 0 where it is not positive in all four orders.
    pooled = brier_summary(np.mean(scores, axis=0))
    assert row["brier_lm_pooled"] == {"mean": pooled["brier_lm"], "std": pooled["brier_lm_error"]}
    again = measure_sampler(samplers["tokcom"], judge, [0, 1], plan)
    assert again["brier_lm_pooled"] == row["brier_lm_pooled"]
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
    assert any("interpolated curve" in line for line in found["lines"])


def test_ratios_on_a_frontier_are_taken_at_equal_entropy():
    reference = [{"entropy": 5.5, "kn_perplexity": 400.0}, {"entropy": 5.1, "kn_perplexity": 100.0}]
    points = [{"entropy": entropy, "kn_perplexity": 220.0} for entropy in (5.0, 5.3, 5.5, 5.6)]
    assert ratios_on_frontier(points, reference, "kn_perplexity") == [
        (5.3, pytest.approx(1.1)),
        (5.5, pytest.approx(0.55)),
    ]
    assert ratios_on_frontier(points, reference[:1], "kn_perplexity") == []


def test_the_sampling_path_starts_at_the_noise(tokcom):
    ids = torch.randint(VOCABULARY - 1, (16, 32), generator=torch.Generator().manual_seed(1))
    path = sampling_path(tokcom, ids, num_steps=4)
    assert path["t"] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert path["text_distance"] > 0 and sampling_path(tokcom, ids)["t"] == [0, 0.5, 1.0]
    # The text before a block decides where its path leads.
    assert sampling_path(tokcom, ids.flip(1), num_steps=4)["predicted_rms"] != path["predicted_rms"]
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


def test_differences_are_tokcoms_own_row_against_its_heads_and_each_baseline():
    generator = np.random.default_rng(0)
    base = generator.random((50, 4))
    scores = {
        "unigram": [base], "heads alone": [base + 0.1], "TokCom, noise removed": [base],
        "TokCom, 4 steps": [base + 0.1, base + 0.3], "TokCom, block 4": [base],
        "autoregressive a": [base], "autoregressive b": [base + 0.2], "autoregressive greedy": [],
    }  # fmt: skip
    found = brier_lm_differences(scores)
    assert set(found) == {"heads alone", "autoregressive a", "autoregressive b"}
    assert found["heads alone"]["brier_2_difference"] == pytest.approx(10.0)
    assert "heads alone: BrierLM +" in difference_line("heads alone", found["heads alone"])
    assert found["autoregressive a"]["difference"] == pytest.approx(20.0, abs=0.1)
    assert found["autoregressive b"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert brier_lm_differences({"TokCom, 4 steps": [], "autoregressive a": [base]}) == {}


def test_few_steps_are_compared_with_many_among_plain_draws_alone():
    point = lambda steps, perplexity, **more: {  # noqa: E731
        "temperature": 1.0, "num_steps": steps, "entropy": 5.0, "kn_perplexity": perplexity,
        "kn_perplexity_held_out": perplexity, **more,
    }  # fmt: skip
    points = [point(8, 110.0, best_of=1), point(8, 50.0, best_of=4), point(32, 100.0, guidance_scale=1.0)]
    text = {"overlap_8": {"mean": 0.0}}
    found = compare({"held-out text": text, "TokCom, 8 steps": text}, {"TokCom": points}, [])
    assert found["steps"] == {"temperature 1": pytest.approx(1.1)}
    assert setting_name(points[1]) == "8 steps, temperature 1, best of 4"


def test_without_noise_every_row_and_every_continuation_is_the_same(tokcom):
    still = TokComSampler(tokcom, {"temperature": 0.0})
    assert len(np.unique(still.rows(5, 16, seed=0), axis=0)) == 1
    prefixes = np.random.default_rng(0).integers(0, VOCABULARY - 1, (4, 8))
    drawn = still.continuations(prefixes, 3, 8, seed=0)
    assert drawn.shape == (4, 3, 8) and (drawn == drawn[:, :1]).all()
    assert len(np.unique(TokComSampler(tokcom).rows(5, 16, seed=0), axis=0)) == 5


def test_a_block_is_drawn_whole_behind_a_prefix(tokcom, samplers):
    assert tokens_behind_prefix(samplers["causal"], 4) == 4 == tokens_behind_prefix(samplers["heads"], 4)
    for size, tokens in ((None, 8), (1, 4), (4, 16), (100, 64), (0, 64)):
        assert tokens_behind_prefix(TokComSampler(tokcom, {"block_size": size}), 4) == tokens


def test_denoising_is_measured_behind_the_text_that_precedes_each_block(tokcom):
    """Blocks of two chunks at once give what each gives alone; other text before a block changes its prediction."""
    ids = torch.randint(VOCABULARY - 1, (2, 32), generator=torch.Generator().manual_seed(2))
    x_t = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3))
    together = BlockDenoiser(tokcom, ids)(x_t, 0.3)
    with torch.no_grad():
        state = tokcom.context(ids[:, :16])[:, -1]
        alone = tokcom.denoiser(x_t[:, 4:6], torch.tensor([0.3]), context=state).clean_latents
    torch.testing.assert_close(together[:, 4:6], alone, atol=1e-5, rtol=1e-4)
    other = BlockDenoiser(tokcom, torch.cat([ids[:, :15], (ids[:, 15:16] + 1) % 30, ids[:, 16:]], dim=1))(x_t, 0.3)
    assert torch.equal(other[:, :4], together[:, :4]) and not torch.allclose(other[:, 4:6], together[:, 4:6])
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    padded = BlockDenoiser(tokcom, ids, mask)(x_t, 0.3)
    assert torch.allclose(padded[0], together[0], atol=1e-5) and not torch.allclose(padded[1, 4:6], together[1, 4:6])
    found = denoising_metrics(tokcom, ids, mask, (0.3, 1.0))
    exact = (tokcom.reconstruct(ids) == ids)[mask.bool()].float().mean().item()
    assert found["direct_accuracy_t_1"] == pytest.approx(exact)
