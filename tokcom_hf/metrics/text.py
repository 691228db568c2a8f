"""Text metrics in one place: what is right, fluent, varied, like real text, and not copied.

Nothing is downloaded. A single number misleads: a generator that repeats one fluent sentence has a fine perplexity, and a
unigram sampler a fine entropy. `TextJudge` measures all of them at once against the same training and held-out text.
"""

from collections.abc import Sequence

import numpy as np

from .text_brier import brier_lm, brier_lm_difference, brier_scores, brier_scores_from_log_probs, brier_summary
from .text_diversity import distinct_n, jensen_shannon, ngrams, self_bleu, unigram_entropy
from .text_memorisation import TrainIndex, memorisation
from .text_ngram import KneserNey
from .text_two_sample import two_sample_auc

__all__ = [
    "KneserNey",
    "TextJudge",
    "TrainIndex",
    "brier_lm",
    "brier_lm_difference",
    "brier_scores",
    "brier_scores_from_log_probs",
    "brier_summary",
    "distinct_n",
    "jensen_shannon",
    "memorisation",
    "ngrams",
    "self_bleu",
    "two_sample_auc",
    "unigram_entropy",
]


class TextJudge:
    """Fits scorers once, then measures any number of sample sets.

    Args:
        train: (tokens,) training text, with its document marks.
        held_out: (rows, length) real text the generators have not seen. Every other row fits the second scorer and is the
            reference of the distribution metrics; `held_out_rows` (the others) are the anchor of real text.
        vocab_size: ids are 0 … vocab_size − 1.
        order: of the Kneser–Ney scorers.
    """

    def __init__(self, train: np.ndarray, held_out: np.ndarray, vocab_size: int, order: int = 5):
        if len(held_out) < 2:
            raise ValueError(f"At least two held-out rows are needed, got {len(held_out)}.")
        # Alternate rows, because the two halves of a corpus often differ in subject.
        self.reference, self.held_out_rows = held_out[0::2], held_out[1::2]
        self.train_scorer = KneserNey(train, vocab_size, order)
        self.held_out_scorer = KneserNey(self.reference, vocab_size, order)
        self.index = TrainIndex(train)

    def measure(self, sequences: Sequence[np.ndarray] | np.ndarray) -> dict[str, float]:
        """All unconditional metrics of samples (a list of 1-d id arrays, or (rows, length)).

        Returns:
            kn_perplexity (scorer fitted on train), kn_perplexity_held_out (fitted on held-out text: if only the first is
            low, the samples copy), entropy (nats), distinct_1 … 4, self_bleu, js_1 … 3 (bits), auc, overlap_8,
            overlap_16, longest_match, mean_longest_match, tokens.
        """
        sequences = [np.asarray(sequence) for sequence in sequences if len(sequence)]
        if not sequences:
            raise ValueError("There are no samples to measure.")
        result = {
            "kn_perplexity": self.train_scorer.perplexity(sequences),
            "kn_perplexity_held_out": self.held_out_scorer.perplexity(sequences),
            "entropy": unigram_entropy(sequences),
        }
        result |= {f"distinct_{n}": distinct_n(sequences, n) for n in (1, 2, 3, 4)}
        result["self_bleu"] = self_bleu(sequences)
        reference = _about_as_much(self.reference, sum(map(len, sequences)))
        result |= {f"js_{n}": jensen_shannon(sequences, reference, n) for n in (1, 2, 3)}
        enough = min(len(sequences), len(self.reference)) >= 5
        result["auc"] = two_sample_auc(sequences, list(self.reference)) if enough else float("nan")
        return result | memorisation(sequences, self.index) | {"tokens": float(sum(map(len, sequences)))}


def _about_as_much(rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The first rows holding at least `tokens` tokens, or all."""
    return list(rows[: max(1, -(-tokens // rows.shape[1]))])
