"""Memorisation: how much of a sample was copied from the training text.

A suffix array of the training tokens gives, for every position of a sample, the length of the longest match with the
training text that begins there. N-gram overlap and the longest match follow from these lengths. Compare them with those of
held-out text.
"""

from collections.abc import Sequence

import numpy as np


class TrainIndex:
    """Suffix array of the training tokens.

    Args:
        tokens: (length,) training ids, or a list of such arrays (no match spans two of them).
        max_match: longest match length that is found; longer matches count as this length.

    Raises:
        ValueError: the training text is empty.
    """

    def __init__(self, tokens: np.ndarray | Sequence[np.ndarray], max_match: int = 128):
        if not (isinstance(tokens, np.ndarray) and tokens.ndim == 1):
            # No sample contains the ids −1 and −2, so every match ends before them.
            tokens = np.concatenate([np.append(np.asarray(part, dtype=np.int64), -2) for part in tokens])
        if len(tokens) == 0:
            raise ValueError("The training text is empty.")
        self.max_match = max_match
        self.tokens = np.append(np.asarray(tokens, dtype=np.int64), -1)
        self.suffixes = _suffix_array(self.tokens, max_match)

    def match_lengths(self, sequence: np.ndarray) -> np.ndarray:
        """Returns the length of the longest match with the training text at each position; (length,) → (length,)."""
        sequence = np.asarray(sequence, dtype=np.int64)
        lengths = np.zeros(len(sequence), dtype=np.int64)
        alive = np.arange(len(sequence))
        low, high = np.zeros(len(sequence), dtype=np.int64), np.full(len(sequence), len(self.suffixes))
        for depth in range(self.max_match):
            alive = alive[alive + depth < len(sequence)]
            if not len(alive):
                break
            wanted = sequence[alive + depth]
            first = self._bound(low[alive], high[alive], depth, wanted)
            last = self._bound(first, high[alive], depth, wanted + 1)
            found = last > first
            alive = alive[found]
            low[alive], high[alive] = first[found], last[found]
            lengths[alive] = depth + 1
        return lengths

    def _bound(self, low: np.ndarray, high: np.ndarray, depth: int, wanted: np.ndarray) -> np.ndarray:
        """Binary search: first suffix in [low, high), sorted by the token at `depth`, whose token there is ≥ `wanted`."""
        low, high = low.copy(), high.copy()
        while (low < high).any():
            middle = (low + high) // 2
            place = np.minimum(self.suffixes[np.minimum(middle, len(self.suffixes) - 1)] + depth, len(self.tokens) - 1)
            less = (self.tokens[place] < wanted) & (low < high)
            low, high = np.where(less, middle + 1, low), np.where(less, high, np.where(low < high, middle, high))
        return low


def _suffix_array(tokens: np.ndarray, depth: int) -> np.ndarray:
    """Returns positions sorted by at least the first `depth` tokens from there on, by prefix doubling."""
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    width = 1
    while width < depth and rank.max() < len(tokens) - 1:
        following = np.zeros_like(rank)
        following[:-width] = rank[width:] + 1
        rank = np.unique(rank * (len(tokens) + 1) + following, return_inverse=True)[1]
        width *= 2
        if width >= len(tokens):
            break
    return np.argsort(rank, kind="stable")


def memorisation(
    sequences: Sequence[np.ndarray], index: TrainIndex, sizes: tuple[int, ...] = (8, 16)
) -> dict[str, float]:
    """Measures the overlap of samples with the training text.

    Returns:
        overlap_n: share of the samples' n-grams that occur in training, for each n of `sizes`, in [0, 1].
        longest_match: length of the longest match of any sequence, in tokens.
        mean_longest_match: longest match of each sequence, averaged, in tokens.
    """
    matches = [index.match_lengths(sequence) for sequence in sequences if len(sequence)]
    result: dict[str, float] = {}
    for n in sizes:
        usable = [match[: len(match) - n + 1] for match in matches if len(match) >= n]
        result[f"overlap_{n}"] = float((np.concatenate(usable) >= n).mean()) if usable else float("nan")
    longest = [int(match.max()) for match in matches]
    result["longest_match"] = float(max(longest, default=0))
    result["mean_longest_match"] = float(np.mean(longest)) if longest else float("nan")
    return result
