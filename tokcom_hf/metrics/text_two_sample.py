"""Classifier two-sample test: cross-validated AUC of a logistic regression on hashed n-grams, samples against real text."""

from collections.abc import Sequence

import numpy as np
import torch

from .text_diversity import ngrams

# Multiplier of Fibonacci hashing (2^64 / golden ratio): spreads n-grams evenly over the buckets.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hashed_features(sequences: Sequence[np.ndarray], orders: tuple[int, ...], num_buckets: int) -> np.ndarray:
    """Returns log(1 + counts) of hashed n-grams, rows scaled to unit norm; (sequences, len(orders) · num_buckets)."""
    features = np.zeros((len(sequences), len(orders) * num_buckets), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        for block, n in enumerate(orders):
            code = np.zeros(max(0, len(sequence) - n + 1), dtype=np.uint64)
            for column in ngrams([sequence], n).T.astype(np.uint64):
                code = (code + column + np.uint64(1)) * _MULTIPLIER
            code ^= code >> np.uint64(29)
            counts = np.bincount((code % np.uint64(num_buckets)).astype(np.int64), minlength=num_buckets)
            features[row, block * num_buckets : (block + 1) * num_buckets] = np.log1p(counts)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-8)


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """ROC AUC: probability that a random positive scores above a random negative, where ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def two_sample_auc(
    sequences: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    orders: tuple[int, ...] = (1, 2),
    num_buckets: int = 2048,
    folds: int = 5,
    weight_decay: float = 1e-3,
    seed: int = 0,
) -> float:
    """Mean held-out AUC of a classifier of samples against real text; 0.5 = indistinguishable, 1 = fully separable.

    The larger set is cut to the size of the smaller one.

    Args:
        sequences, reference: samples and real text, lists of 1-d id arrays.
        orders: n-gram lengths that are features.
        num_buckets: hash buckets per order.
        folds: number of cross-validation folds.
        weight_decay: L2 penalty of the logistic regression.
        seed: seed of the split into folds.

    Raises:
        ValueError: a set has fewer than `folds` sequences.
    """
    count = min(len(sequences), len(reference))
    if count < folds:
        raise ValueError(f"The two-sample test needs at least {folds} sequences in each set, got {count}.")
    both = [*sequences[:count], *reference[:count]]
    features = torch.from_numpy(hashed_features(both, orders, num_buckets))
    labels = torch.cat([torch.ones(count), torch.zeros(count)])
    order = np.random.default_rng(seed).permutation(count)
    fold_of = np.zeros(2 * count, dtype=np.int64)
    fold_of[order] = fold_of[order + count] = np.arange(count) % folds
    aucs = []
    for fold in range(folds):
        train, test = torch.from_numpy(fold_of != fold), torch.from_numpy(fold_of == fold)
        weights = _logistic_regression(features[train], labels[train], weight_decay)
        aucs.append(area_under_curve((features[test] @ weights).numpy(), labels[test].numpy()))
    return float(np.mean(aucs))


def _logistic_regression(features: torch.Tensor, labels: torch.Tensor, weight_decay: float) -> torch.Tensor:
    """Returns weights (dimensions,) that minimise mean log loss + weight_decay · |w|²; AUC needs no bias."""
    centered = features - features.mean(dim=0)
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(centered @ weights, labels)
        loss = loss + weight_decay * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()
