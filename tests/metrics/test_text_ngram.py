"""The vectorised Kneser–Ney model against a dictionary version written straight from the formulas."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from tokcom_hf.metrics.text_ngram import FALLBACK_DISCOUNTS, KneserNey, discounts


class SlowKneserNey:
    """Chen and Goodman's interpolated modified Kneser–Ney, one dictionary per order."""

    def __init__(self, sequences, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        raw = [Counter() for _ in range(order + 2)]
        for sequence in sequences:
            for n in range(1, order + 1):
                for i in range(len(sequence) - n + 1):
                    raw[n][tuple(sequence[i : i + n])] += 1
        self.counts = {order: dict(raw[order])}
        for n in range(1, order):
            left = defaultdict(set)
            for gram in raw[n + 1]:
                left[gram[1:]].add(gram[0])
            self.counts[n] = {gram: len(left[gram]) for gram in raw[n]}
        self.cuts = {n: (0.0, *discounts(np.array(list(c.values())))) for n, c in self.counts.items()}

    def probability(self, token, context):
        context = tuple(context)[len(context) - min(len(context), self.order - 1) :]
        return self._level(token, context)

    def _level(self, token, context):
        lower = self._level(token, context[1:]) if context else 1.0 / self.vocab_size
        n = len(context) + 1
        rows = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        total = sum(rows.values())
        if total == 0:
            return lower
        cut = self.cuts[n]
        removed = sum(c - max(c - cut[min(c, 3)], 0.0) for c in rows.values())
        own = rows.get((*context, token), 0)
        return max(own - cut[min(own, 3)], 0.0) / total + removed / total * lower


@pytest.fixture(scope="module")
def corpus():
    generator = np.random.default_rng(0)
    weights = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    return [generator.choice(6, size, p=weights) for size in (300, 7, 200, 3)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_matches_the_slow_reference(corpus, order):
    fast, slow = KneserNey(corpus, 8, order), SlowKneserNey([s.tolist() for s in corpus], 8, order)
    text = np.random.default_rng(1).integers(0, 8, 60)
    expected = [np.log(slow.probability(token, text[:i].tolist())) for i, token in enumerate(text.tolist())]
    np.testing.assert_allclose(fast.log_probabilities(text), expected, rtol=1e-9)


def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(corpus):
    model = KneserNey(corpus, 8, 4)
    for context in ([0, 1, 0], [0, 0, 0], [7, 7, 7], [5, 7, 0], []):
        total = sum(np.exp(model.log_probabilities([*context, token])[-1]) for token in range(8))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_discounts_by_hand():
    # n1..n4 = 4, 3, 2, 1: Y = 4/10, D1 = 1 − 2·0.4·3/4, D2 = 2 − 3·0.4·2/3, D3 = 3 − 4·0.4·1/2.
    counts = np.array([1] * 4 + [2] * 3 + [3] * 2 + [4])
    assert discounts(counts) == pytest.approx((0.4, 1.2, 2.2))
    assert discounts(np.array([1, 1, 5])) == FALLBACK_DISCOUNTS


def test_samples_follow_the_models_own_distribution(corpus):
    model = KneserNey(corpus, 8, 3)
    prompts = np.tile([[0, 1]], (40_000, 1))
    drawn = model.sample(40_000, 1, seed=3, prompts=prompts)[:, 0]
    expected = [np.exp(model.log_probabilities([0, 1, token])[-1]) for token in range(8)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=8) / 40_000, expected, atol=0.01)
    first = model.sample(40_000, 1, seed=4)[:, 0]
    expected = [np.exp(model.log_probabilities([token])[0]) for token in range(8)]
    np.testing.assert_allclose(np.bincount(first, minlength=8) / 40_000, expected, atol=0.01)


def test_perplexity_of_own_samples_lies_below_that_of_noise(corpus):
    model = KneserNey(corpus, 8, 5)
    own = model.perplexity(list(model.sample(50, 40, seed=0)))
    noise = model.perplexity([np.random.default_rng(0).integers(0, 8, 40) for _ in range(50)])
    assert own < noise
    assert np.array_equal(model.sample(3, 9, seed=5), model.sample(3, 9, seed=5))


def test_order_one_ignores_the_prompt_and_counts_only(corpus):
    model = KneserNey(corpus, 6, 1)
    drawn = model.sample(20_000, 2, seed=0, prompts=np.zeros((20_000, 3), dtype=int))
    counts = np.bincount(np.concatenate(corpus), minlength=6)
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=6) / 40_000, counts / counts.sum(), atol=0.012)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        KneserNey([], 4)
    with pytest.raises(ValueError, match=r"0 … 3, got 0 … 4"):
        KneserNey(np.arange(5), 4)
    with pytest.raises(ValueError, match="order"):
        KneserNey(np.arange(4), 4, order=0)
