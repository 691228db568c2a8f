"""Text metrics against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from tokcom_hf.evaluation.tokcom_reconstruction import rare_token_accuracy
from tokcom_hf.metrics.text import (
    KneserNey,
    TextJudge,
    TrainIndex,
    brier_lm,
    brier_lm_difference,
    brier_scores,
    brier_scores_from_log_probs,
    brier_summary,
    distinct_n,
    jensen_shannon,
    memorisation,
    self_bleu,
    two_sample_auc,
    unigram_entropy,
)
from tokcom_hf.metrics.text_two_sample import area_under_curve


def arrays(*rows):
    return [np.array(row) for row in rows]


# ---------------------------------------------------------------- BrierLM
def test_brier_is_the_documented_formula_for_two_draws():
    targets = np.array([[1, 2, 3, 4]])
    for a, b in itertools.product(([1, 2, 3, 4], [1, 2, 9, 4], [5, 2, 3, 4]), repeat=2):
        scores = brier_scores(np.array([[a, b]]), targets)[0]
        for n in range(1, 5):
            y = targets[0, :n].tolist()
            expected = (a[:n] == y) + (b[:n] == y) - (a[:n] == b[:n])
            assert scores[n - 1] == expected


def test_brier_is_unbiased_over_all_pairs_of_draws():
    """Enumerates every pair (a, b) with its probability: the mean is 2·p(y) − Σ p², for each n."""
    p = {(0, 0, 0, 0): 0.5, (0, 1, 0, 0): 0.3, (1, 0, 0, 0): 0.2}
    y = (0, 1, 0, 0)
    mean = np.zeros(4)
    for a, b in itertools.product(p, repeat=2):
        mean += p[a] * p[b] * brier_scores(np.array([[a, b]]), np.array([y]))[0]
    for n in range(1, 5):
        marginal = {}
        for w, weight in p.items():
            marginal[w[:n]] = marginal.get(w[:n], 0) + weight
        assert mean[n - 1] == pytest.approx(2 * marginal[y[:n]] - sum(v**2 for v in marginal.values()))


def test_brier_from_probabilities_has_the_same_expectation():
    p = {(0, 0, 0, 0): 0.5, (0, 1, 0, 0): 0.3, (1, 0, 0, 0): 0.2}
    y = (0, 1, 0, 0)

    def token_log_probs(text):
        mass = [sum(v for w, v in p.items() if w[:n] == text[:n]) for n in range(5)]
        return [np.log(mass[n] / mass[n - 1]) for n in range(1, 5)]

    mean = np.zeros(4)
    for a in p:
        mean += p[a] * brier_scores_from_log_probs(np.array([[token_log_probs(a)]]), np.array([token_log_probs(y)]))[0]
    for n in range(1, 5):
        marginal = {}
        for w, weight in p.items():
            marginal[w[:n]] = marginal.get(w[:n], 0) + weight
        assert mean[n - 1] == pytest.approx(2 * marginal[y[:n]] - sum(v**2 for v in marginal.values()))
    with pytest.raises(ValueError, match="Expected log-probabilities"):
        brier_scores_from_log_probs(np.zeros((2, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="must hold 4 tokens"):
        brier_scores_from_log_probs(np.zeros((2, 1, 3)), np.zeros((2, 4)))


def test_the_difference_of_two_models_is_measured_on_the_same_prefixes():
    generator = np.random.default_rng(0)
    easy = generator.random((400, 1)) * np.ones(4)
    first, second = easy + 0.02, easy + generator.normal(0, 0.01, (400, 4))
    found = brier_lm_difference(first, second)
    assert found["difference"] == pytest.approx(2.0, abs=0.2)
    assert 0 < found["error"] < 0.2 < brier_summary(first)["brier_lm_error"]
    assert found["low"] < found["difference"] < found["high"] < found["low"] + 4.2 * found["error"]
    for n in range(1, 5):
        assert found[f"brier_{n}_difference"] == pytest.approx(2.0, abs=0.2)
        assert 1.5 < found[f"brier_{n}_low"] < found[f"brier_{n}_difference"] < found[f"brier_{n}_high"] < 2.5
    with pytest.raises(ValueError, match="same prefixes"):
        brier_lm_difference(first[1:], second)


def test_the_error_does_not_shrink_when_neighbours_repeat_each_other():
    """Overlapping prefixes are not more text: each score ten times over tells no more than once."""
    scores = np.random.default_rng(1).random((100, 4))
    once, ten_times = brier_summary(scores), brier_summary(np.repeat(scores, 10, axis=0))
    assert ten_times["brier_lm"] == pytest.approx(once["brier_lm"])
    assert ten_times["brier_lm_error"] > 0.6 * once["brier_lm_error"]


def test_more_draws_average_over_pairs():
    draws = np.array([[[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2]]])
    # hits 2/3, one of three pairs collides.
    assert brier_scores(draws, np.array([[1, 1, 1, 1]]))[0, 0] == pytest.approx(4 / 3 - 1 / 3)


def test_brier_lm_combines_geometrically_and_is_100_for_an_oracle():
    targets = np.random.default_rng(0).integers(0, 9, (50, 4))
    oracle = np.repeat(targets[:, None], 2, axis=1)
    assert brier_lm(oracle, targets)["brier_lm"] == pytest.approx(100.0)
    half = oracle.copy()
    half[:25, :, 3] = -np.arange(1, 3)
    result = brier_lm(half, targets)
    assert result["brier_4"] == pytest.approx(50.0)
    assert result["brier_lm"] == pytest.approx(100 * 0.5**0.25)
    assert result["brier_lm_error"] > 0
    repeated = np.full_like(oracle, 99)
    assert brier_lm(repeated, targets)["brier_lm"] == 0.0


def test_brier_refuses_one_draw_and_short_continuations():
    with pytest.raises(ValueError, match="two independent samples"):
        brier_scores(np.zeros((2, 1, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="must hold 4 tokens"):
        brier_scores(np.zeros((2, 2, 3)), np.zeros((2, 4)))


# ---------------------------------------------------------------- diversity and distribution
def test_distinct_and_entropy_by_hand():
    rows = arrays([1, 2, 1, 2], [1, 3])
    assert distinct_n(rows, 1) == pytest.approx(3 / 6)
    assert distinct_n(rows, 2) == pytest.approx(3 / 4)
    assert unigram_entropy(arrays([0, 0, 1, 1])) == pytest.approx(math.log(2))
    assert unigram_entropy(arrays([7, 7, 7])) == 0.0


def test_jensen_shannon_of_known_distributions():
    assert jensen_shannon(arrays([0, 1]), arrays([2, 3]), 1) == pytest.approx(1.0)
    assert jensen_shannon(arrays([0, 1, 0, 1]), arrays([0, 1]), 1) == pytest.approx(0.0)
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) − (0 + 1) / 2.
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert jensen_shannon(arrays([0, 0]), arrays([0, 1]), 1) == pytest.approx(entropy - 0.5)
    # Same tokens, other order: alike as unigrams, nothing in common as bigrams.
    assert jensen_shannon(arrays([0, 1]), arrays([1, 0]), 2) == pytest.approx(1.0)


def test_self_bleu_by_hand():
    assert self_bleu(arrays([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])) == pytest.approx(1.0)
    # Against the other: 3 of 4 tokens, 2 of 3 pairs, 1 of 2 triples, no quadruple (0.1 of 1).
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert self_bleu(arrays([1, 2, 3, 4], [1, 2, 3, 9])) == pytest.approx(expected)
    # Clipping: the second row offers one 1, so 1 of 4 counts; the shorter row pays exp(1 − 5/4).
    first = (0.25 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25 * math.exp(1 - 5 / 4)
    second = (0.2 * 0.1 / 4 * 0.1 / 3 * 0.1 / 2) ** 0.25
    assert self_bleu(arrays([1, 1, 1, 1], [1, 2, 3, 4, 5])) == pytest.approx((first + second) / 2)


# ---------------------------------------------------------------- classifier
def test_auc_by_hand_and_with_ties():
    assert area_under_curve(np.array([0.9, 0.8, 0.3, 0.1]), np.array([1, 0, 1, 0])) == pytest.approx(0.75)
    assert area_under_curve(np.ones(4), np.array([1, 0, 1, 0])) == pytest.approx(0.5)


def test_classifier_tells_other_text_and_not_the_same_text():
    generator = np.random.default_rng(0)
    real = [generator.integers(0, 50, 100) for _ in range(80)]
    alike = [generator.integers(0, 50, 100) for _ in range(80)]
    shifted = [generator.integers(25, 75, 100) for _ in range(80)]
    # Same unigrams, but always a token followed by its successor: only pairs give it away.
    ordered = [(generator.integers(0, 50, 50)[:, None] + np.arange(2)).ravel() % 50 for _ in range(80)]
    assert 0.35 < two_sample_auc(alike, real) < 0.65
    assert two_sample_auc(shifted, real) > 0.99
    assert two_sample_auc(ordered, real) > 0.8
    with pytest.raises(ValueError, match="at least 5"):
        two_sample_auc(real[:3], real)


# ---------------------------------------------------------------- memorisation
def slow_match(train, sequence, start, limit):
    best = 0
    for origin in range(len(train)):
        size = 0
        while (
            size < limit
            and start + size < len(sequence)
            and origin + size < len(train)
            and train[origin + size] == sequence[start + size]
        ):
            size += 1
        best = max(best, size)
    return best


@pytest.mark.parametrize("vocabulary,limit", [(2, 128), (3, 6), (20, 16)])
def test_match_lengths_equal_brute_force(vocabulary, limit):
    generator = np.random.default_rng(vocabulary)
    train, sequence = generator.integers(0, vocabulary, 200), generator.integers(0, vocabulary, 60)
    sequence[20:50] = train[100:130]
    found = TrainIndex(train, max_match=limit).match_lengths(sequence)
    assert found.tolist() == [slow_match(train.tolist(), sequence.tolist(), i, limit) for i in range(60)]


def test_memorisation_counts_copied_ngrams():
    train = np.arange(100)
    copied, fresh = np.arange(10, 30), np.arange(20)[::-1].copy()
    index = TrainIndex(train)
    result = memorisation([copied, fresh], index)
    assert result["overlap_8"] == pytest.approx(0.5)
    assert result["longest_match"] == 20 and result["mean_longest_match"] == pytest.approx(10.5)
    assert memorisation([train[-5:]], index)["longest_match"] == 5
    assert TrainIndex(arrays([1, 2], [3, 4])).match_lengths(np.array([1, 2, 3, 4])).tolist() == [2, 1, 2, 1]


# ---------------------------------------------------------------- reconstruction details, judge
def test_rare_tokens_are_those_seldom_seen_in_training():
    target, predicted = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 9, 2, 9]])
    counts = torch.tensor([100, 100, 3])
    result = rare_token_accuracy(predicted, target, torch.tensor([[1, 1, 1, 1]]), counts)
    assert result == {"rare_token_accuracy": 0.5, "rare_token_share": 0.5}


def test_judge_ranks_real_text_before_noise_and_sees_copies():
    generator = np.random.default_rng(0)
    source = KneserNey(np.repeat(generator.integers(0, 40, 400), 2), 40, 3)
    train, held_out = source.sample(1, 6000, seed=1)[0], source.sample(40, 60, seed=2)
    judge = TextJudge(train, held_out, 40)
    real, noise = judge.measure(judge.held_out_rows), judge.measure(generator.integers(0, 40, (20, 60)))
    copied = judge.measure(train[:1200].reshape(20, 60))
    assert real["kn_perplexity"] < noise["kn_perplexity"]
    assert real["js_2"] < noise["js_2"] and real["auc"] < noise["auc"]
    assert copied["overlap_8"] == 1.0 > real["overlap_8"]
    assert copied["kn_perplexity"] < real["kn_perplexity"]
    assert real["tokens"] == 1200
