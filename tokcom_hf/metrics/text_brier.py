"""BrierLM: a proper score for generators that give samples but no probabilities (CALM, arXiv 2510.27688).

For a prefix with true continuation y and independent samples a, b of the model, 1{a=y} + 1{b=y} − 1{a=b} is an unbiased
estimate of 2·p(y) − Σ_w p(w)², one minus the Brier score. Brier-n is this estimate over the first n tokens, averaged over
prefixes. BrierLM is 100 times the geometric mean of Brier-1 … Brier-4. Where p is known, 2·p(y) − p(a) estimates the same
value with less noise, because samples rarely agree with the truth or each other in all of four tokens.
"""

from itertools import combinations

import numpy as np


def brier_scores(samples: np.ndarray, targets: np.ndarray, max_order: int = 4) -> np.ndarray:
    """Computes Brier-n of each prefix from samples.

    Args:
        samples: (prefixes, draws, ≥ max_order) ids, independent draws per prefix. Two draws give the formula above; with
            more, it is averaged over all pairs, which is still unbiased and less noisy.
        targets: (prefixes, ≥ max_order) ids of the true continuations.
        max_order: largest n.

    Returns:
        (prefixes, max_order) values in [−1, 1].

    Raises:
        ValueError: there are fewer than two draws, continuations are too short, or shapes do not match.
    """
    samples, targets = np.asarray(samples), np.asarray(targets)
    if samples.ndim != 3 or targets.ndim != 2 or len(samples) != len(targets):
        raise ValueError(
            f"Expected samples (prefixes, draws, tokens) and targets (prefixes, tokens), got {samples.shape} and "
            f"{targets.shape}."
        )
    draws = samples.shape[1]
    if draws < 2:
        raise ValueError(f"BrierLM needs at least two independent samples per prefix, got {draws}.")
    if min(samples.shape[2], targets.shape[1]) < max_order:
        raise ValueError(f"Continuations must hold {max_order} tokens, got {samples.shape[2]} and {targets.shape[1]}.")
    samples, targets = samples[..., :max_order], targets[:, :max_order]
    # logical_and.accumulate turns "token n agrees" into "the first n tokens agree".
    hits = np.logical_and.accumulate(samples == targets[:, None], axis=-1).mean(axis=1)
    pairs = list(combinations(range(draws), 2))
    collisions = np.zeros(hits.shape)
    for a, b in pairs:
        collisions += np.logical_and.accumulate(samples[:, a] == samples[:, b], axis=-1)
    return 2 * hits - collisions / len(pairs)


def brier_scores_from_log_probs(
    sample_log_probs: np.ndarray, target_log_probs: np.ndarray, max_order: int = 4
) -> np.ndarray:
    """Computes Brier-n of each prefix from probabilities: 2·p(y) − mean over draws a of p(a).

    Because the draws come from p, the expectation of p(a) is Σ_w p(w)², so the result has the same expectation as
    `brier_scores` but less variance.

    Args:
        sample_log_probs: (prefixes, draws, ≥ max_order), log p in nats of each token of each draw given the tokens before.
        target_log_probs: (prefixes, ≥ max_order), the same for the true continuations.
        max_order: largest n.

    Returns:
        (prefixes, max_order) values in [−1, 2].

    Raises:
        ValueError: shapes do not match, or continuations are too short.
    """
    drawn, target = np.asarray(sample_log_probs, dtype=np.float64), np.asarray(target_log_probs, dtype=np.float64)
    if drawn.ndim != 3 or target.ndim != 2 or len(drawn) != len(target):
        raise ValueError(
            f"Expected log-probabilities (prefixes, draws, tokens) and (prefixes, tokens), got {drawn.shape} and "
            f"{target.shape}."
        )
    if min(drawn.shape[2], target.shape[1]) < max_order:
        raise ValueError(f"Continuations must hold {max_order} tokens, got {drawn.shape[2]} and {target.shape[1]}.")
    probability = np.exp(target[:, :max_order].cumsum(axis=-1))
    return 2 * probability - np.exp(drawn[..., :max_order].cumsum(axis=-1)).mean(axis=1)


def brier_lm(
    samples: np.ndarray, targets: np.ndarray, max_order: int = 4, bootstrap: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Computes BrierLM, its parts, and a bootstrap standard error over prefixes; arguments as for `brier_scores`.

    Returns:
        brier_lm: 100 · (Π Brier-n)^¼, or 0 if one of the averages is not positive, so it cannot rank such models.
        brier_lm_error: bootstrap standard error of brier_lm.
        brier_1 … brier_4: 100 · Brier-n, averaged over prefixes.
        prefixes: number of prefixes.
    """
    return brier_summary(brier_scores(samples, targets, max_order), bootstrap, seed)


def brier_summary(scores: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> dict[str, float]:
    """Computes the result of `brier_lm` from the scores (prefixes, orders) of one of the two functions above."""
    resampled = [_geometric_mean(means) for means in _resampled_means(scores, bootstrap, seed)]
    means = scores.mean(axis=0)
    result = {"brier_lm": _geometric_mean(means), "brier_lm_error": float(np.std(resampled))}
    result |= {f"brier_{n}": 100.0 * float(mean) for n, mean in enumerate(means, 1)}
    return result | {"prefixes": float(len(scores))}


def brier_lm_difference(
    first: np.ndarray, second: np.ndarray, bootstrap: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Compares two models by their scores (prefixes, orders) on the same prefixes: BrierLM of `first` minus `second`.

    Returns:
        difference, error, low, high: the difference of BrierLM, its bootstrap standard error, and its 95 % interval. The
            bootstrap draws the same prefixes for both models, so that the prefixes' difficulty cancels.
        brier_n_difference, brier_n_low, brier_n_high: difference and interval of 100 · Brier-n, for each order n.

    Raises:
        ValueError: the scores have different shapes.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(
            f"Both models must be scored on the same prefixes, got scores {np.shape(first)} and {np.shape(second)}."
        )
    one, other = (_resampled_means(scores, bootstrap, seed) for scores in (first, second))
    resampled = [_geometric_mean(a) - _geometric_mean(b) for a, b in zip(one, other)]
    result = {
        "difference": _geometric_mean(first.mean(axis=0)) - _geometric_mean(second.mean(axis=0)),
        "error": float(np.std(resampled)),
        **_interval("", resampled),
    }
    means = 100.0 * (first.mean(axis=0) - second.mean(axis=0))
    for n, (mean, drawn) in enumerate(zip(means, 100.0 * (one - other).T), 1):
        result |= {f"brier_{n}_difference": float(mean), **_interval(f"brier_{n}_", drawn)}
    return result


def _interval(prefix: str, resampled: np.ndarray | list[float]) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {f"{prefix}low": float(low), f"{prefix}high": float(high)}


def _resampled_means(scores: np.ndarray, bootstrap: int, seed: int, blocks: int = 200) -> np.ndarray:
    """Block bootstrap: means (bootstrap, orders) over blocks of neighbouring prefixes drawn with replacement.

    Prefixes of `held_out_prefixes` are in the order of the text and overlap, so they are not independent; drawing them one
    by one would underestimate the error.
    """
    parts = np.array_split(np.arange(len(scores)), min(blocks, len(scores)))
    sums, sizes = np.stack([scores[part].sum(axis=0) for part in parts]), np.array([len(part) for part in parts])
    drawn = np.random.default_rng(seed).integers(0, len(parts), (bootstrap, len(parts)))
    return sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1, keepdims=True)


def _geometric_mean(means: np.ndarray) -> float:
    return 0.0 if (means <= 0).any() else 100.0 * float(np.exp(np.log(means).mean()))
