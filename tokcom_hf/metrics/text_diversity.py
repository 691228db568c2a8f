"""Diversity of samples, and distance of their n-gram distribution from that of real text.

All functions take a list of 1-d id arrays. All estimates here depend on the amount of text, so compare only samples with
equal numbers of tokens.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

Sequences = Sequence[np.ndarray]


def ngrams(sequences: Sequences, n: int) -> np.ndarray:
    """Returns all n-grams of all sequences, (count, n) int64; no n-gram spans two sequences."""
    parts = [
        np.lib.stride_tricks.sliding_window_view(np.asarray(sequence, dtype=np.int64), n)
        for sequence in sequences
        if len(sequence) >= n
    ]
    return np.concatenate(parts) if parts else np.zeros((0, n), dtype=np.int64)


def distinct_n(sequences: Sequences, n: int) -> float:
    """Number of distinct n-grams divided by the number of n-grams, in (0, 1]; NaN without n-grams."""
    grams = ngrams(sequences, n)
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else float("nan")


def unigram_entropy(sequences: Sequences) -> float:
    """Entropy of the token frequencies in nats; this plug-in estimate rises with the number of tokens."""
    _, counts = np.unique(np.concatenate([np.asarray(s) for s in sequences]), return_counts=True)
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def jensen_shannon(sequences: Sequences, reference: Sequences, n: int) -> float:
    """Jensen–Shannon divergence of the n-gram frequencies in bits: 0 = equal, 1 = no n-gram in common.

    Sampling noise keeps it above 0 even for two halves of one text; compare it with that value.
    """
    first, second = ngrams(sequences, n), ngrams(reference, n)
    if not len(first) or not len(second):
        return float("nan")
    unique, index = np.unique(np.concatenate([first, second]), axis=0, return_inverse=True)
    index = index.reshape(-1)
    p = np.bincount(index[: len(first)], minlength=len(unique)) / len(first)
    q = np.bincount(index[len(first) :], minlength=len(unique)) / len(second)
    middle = (p + q) / 2
    return float(sum(0.5 * (x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum() for x in (p, q)))


def self_bleu(sequences: Sequences, max_order: int = 4, max_sequences: int = 200) -> float:
    """Mean BLEU of each sequence against all others, in [0, 1]; 1 = all equal (Zhu et al. 2018, arXiv 1802.01886).

    BLEU is the geometric mean of clipped precisions of orders 1 … max_order, times the brevity penalty to the closest
    length. An order without a match gets the precision 0.1 / number of n-grams, as is usual for this metric. Only the first
    `max_sequences` sequences are used.
    """
    rows = [np.asarray(s).tolist() for s in sequences[:max_sequences] if len(s) >= max_order]
    if len(rows) < 2:
        return float("nan")
    log_precision = np.zeros(len(rows))
    for n in range(1, max_order + 1):
        counters = [Counter(zip(*(row[i:] for i in range(n)))) for row in rows]
        # Per n-gram: the largest count, the sequence that has it, and the second largest count. They give the maximum over
        # all other sequences.
        best: dict[tuple, tuple[int, int, int]] = {}
        for owner, counter in enumerate(counters):
            for gram, count in counter.items():
                top, who, runner_up = best.get(gram, (0, -1, 0))
                best[gram] = (count, owner, top) if count > top else (top, who, max(runner_up, count))
        for row, counter in enumerate(counters):
            matched = 0
            for gram, count in counter.items():
                top, who, runner_up = best[gram]
                matched += min(count, runner_up if who == row else top)
            log_precision[row] += np.log(max(matched, 0.1) / sum(counter.values()))
    lengths = np.array([len(row) for row in rows])
    scores = []
    for row, length in enumerate(lengths):
        others = np.delete(lengths, row)
        closest = others[np.lexsort((others, np.abs(others - length)))[0]]
        penalty = 1.0 if length >= closest else np.exp(1 - closest / length)
        scores.append(penalty * np.exp(log_precision[row] / max_order))
    return float(np.mean(scores))
