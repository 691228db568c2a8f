"""Interpolated modified Kneser–Ney n-gram model in numpy: scores the fluency of text, and samples as a baseline.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), with three discounts per
order. The highest order uses counts, the lower orders use continuation counts. Unigrams are interpolated with the uniform
distribution, so that every id of the vocabulary has a probability. Sequences have no start symbol, because rows of packed
text begin anywhere; the first tokens are scored with the shorter context that they have.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# KenLM's --discount_fallback, for corpora that are too small to estimate discounts.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


class _Order(NamedTuple):
    """The n-grams of one order, sorted by (context, token).

    keys: context id · vocab_size + token.
    discounted: max(count − D(count), 0) of each n-gram.
    cumulative: running sum of `discounted`, beginning with 0.
    total: sum of the counts of each context; 0 for a context that was not seen.
    backoff: weight of the next lower order, per context.
    starts: index of the first n-gram of each context.
    """

    keys: np.ndarray
    discounted: np.ndarray
    cumulative: np.ndarray
    total: np.ndarray
    backoff: np.ndarray
    starts: np.ndarray


class KneserNey:
    """Modified Kneser–Ney model of token sequences.

    Args:
        sequences: one 1-d array of ids, or a list of them; no n-gram spans two sequences.
        vocab_size: ids are 0 … vocab_size − 1.
        order: length of the longest n-grams.

    Raises:
        ValueError: there are no tokens, ids are outside the vocabulary, or `order` is below 1.
    """

    def __init__(self, sequences: np.ndarray | Sequence[np.ndarray], vocab_size: int, order: int = 5):
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}.")
        tokens, preceding = _join(sequences)
        if len(tokens) == 0:
            raise ValueError("A Kneser–Ney model needs at least one token to be fitted on.")
        _check_range(tokens, vocab_size)
        self.vocab_size, self.order = vocab_size, order
        self.orders: list[_Order] = []
        context = np.zeros(len(tokens), dtype=np.int64)
        num_contexts = 1
        keys, first, ids, counts = [], [], [], []
        for n in range(1, order + 1):
            valid = np.flatnonzero(preceding >= n - 1)
            key = context[valid] * vocab_size + tokens[valid]
            unique, index, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            gram = np.full(len(tokens), -1, dtype=np.int64)
            gram[valid] = inverse
            keys.append((unique, num_contexts))
            first.append(valid[index])
            ids.append(gram)
            counts.append(count)
            context = np.concatenate([[-1], gram[:-1]])
            num_contexts = len(unique)
        for n in range(order):
            if n + 1 < order:
                # Continuation counts: every distinct (n+1)-gram adds one to its n-token suffix.
                counts[n] = np.bincount(ids[n][first[n + 1]], minlength=len(keys[n][0]))
            self.orders.append(_build_order(*keys[n], counts[n], vocab_size))

    def log_probabilities(self, tokens: np.ndarray | Sequence[int]) -> np.ndarray:
        """Returns log p in nats of each token given up to order − 1 tokens before it; (length,) → (length,)."""
        tokens = np.asarray(tokens, dtype=np.int64)
        _check_range(tokens, self.vocab_size)
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        context = np.zeros(len(tokens), dtype=np.int64)
        for order in self.orders:
            usable = np.flatnonzero((context >= 0) & (order.total[context] > 0))
            gram = np.full(len(tokens), -1, dtype=np.int64)
            # Also contexts with a total of 0: the n-gram's id is the next order's context.
            known = np.flatnonzero(context >= 0)
            gram[known] = _find(order.keys, context[known] * self.vocab_size + tokens[known])
            own = context[usable]
            mass = np.where(gram[usable] >= 0, order.discounted[gram[usable]], 0.0)
            probability[usable] = mass / order.total[own] + order.backoff[own] * probability[usable]
            context = np.concatenate([[-1], gram[:-1]])
        return np.log(probability)

    def perplexity(self, sequences: Sequence[np.ndarray]) -> float:
        """Perplexity: exp of the mean negative log-probability of all tokens of all sequences; NaN without tokens."""
        logs = [self.log_probabilities(sequence) for sequence in sequences if len(sequence)]
        return float(np.exp(-np.concatenate(logs).mean())) if logs else float("nan")

    def sample(self, num_samples: int, length: int, seed: int = 0, prompts: np.ndarray | None = None) -> np.ndarray:
        """Draws sequences, or continuations of `prompts` (num_samples, prompt length).

        Sampling follows the interpolation: with probability 1 − backoff a token is drawn from the discounted n-grams of the
        longest seen context; otherwise the context loses its first token.

        Returns:
            ids (num_samples, length), without the prompts.

        Raises:
            ValueError: the number of prompts differs from `num_samples`.
        """
        generator = np.random.default_rng(seed)
        history = (
            np.zeros((num_samples, 0), dtype=np.int64) if prompts is None else np.asarray(prompts, dtype=np.int64)
        )
        if len(history) != num_samples:
            raise ValueError(f"Expected {num_samples} prompts, got {len(history)}.")
        output = np.zeros((num_samples, length), dtype=np.int64)
        window = history[:, max(0, history.shape[1] - self.order + 1) :]
        for position in range(length):
            token = self._sample_next(window, generator)
            output[:, position] = token
            window = np.concatenate([window, token[:, None]], axis=1)[:, -(self.order - 1) or window.shape[1] + 1 :]
        return output

    def _sample_next(self, window: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        rows, width = window.shape
        token = generator.integers(0, self.vocab_size, (rows,), dtype=np.int64)
        undecided = np.ones(rows, dtype=bool)
        for n in range(min(self.order, width + 1), 0, -1):
            order = self.orders[n - 1]
            context = np.zeros(rows, dtype=np.int64)
            for depth in range(n - 1):
                column = window[:, width - (n - 1) + depth]
                found = _find(self.orders[depth].keys, context * self.vocab_size + column)
                context = np.where((context >= 0) & (found >= 0), found, -1)
            seen = undecided & (context >= 0) & (order.total[context] > 0)
            stays = seen & (generator.random(rows) >= order.backoff[context])
            chosen = np.flatnonzero(stays)
            low, high = order.starts[context[chosen]], order.starts[context[chosen] + 1]
            base, top = order.cumulative[low], order.cumulative[high]
            target = base + generator.random(len(chosen)) * (top - base)
            place = np.clip(np.searchsorted(order.cumulative, target, side="right") - 1, low, high - 1)
            token[chosen] = order.keys[place] % self.vocab_size
            undecided[chosen] = False
        return token


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Computes the discounts D1, D2, D3+ of Chen and Goodman from the counts (n,) of an order's n-grams.

    Y = n1 / (n1 + 2 n2), D_k = k − (k + 1) · Y · n_{k+1} / n_k, where n_k is the number of n-grams with count k. Returns
    (0.5, 1, 1.5) if an n_k is zero or a discount is outside [0, k].
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if any(not 0 <= value <= k for k, value in enumerate(found, 1)):
        return FALLBACK_DISCOUNTS
    return found


def _build_order(keys: np.ndarray, num_contexts: int, counts: np.ndarray, vocab_size: int) -> _Order:
    cut = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
    discounted = np.maximum(counts - cut, 0.0)
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=num_contexts)
    removed = np.bincount(context, weights=counts - discounted, minlength=num_contexts)
    backoff = np.divide(removed, total, out=np.ones_like(total), where=total > 0)
    starts = np.searchsorted(context, np.arange(num_contexts + 1))
    return _Order(keys, discounted, np.concatenate([[0.0], np.cumsum(discounted)]), total, backoff, starts)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the index of each wanted key in the sorted keys, −1 if absent."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _join(sequences: np.ndarray | Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all tokens in one array, and the number of tokens before each one in its own sequence."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 1:
        sequences = [sequences]
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts])


def _check_range(tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"Token ids must be in 0 … {vocab_size - 1}, got {tokens.min()} … {tokens.max()}.")
