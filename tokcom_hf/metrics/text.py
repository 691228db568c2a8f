"""All text metrics: calibration, fluency, diversity, similarity to real text, and memorisation.

Nothing is downloaded. A single metric misleads: a generator that repeats one fluent sentence has a good perplexity, and a
unigram sampler a good entropy. `TextJudge` therefore computes all unconditional metrics, against the same training and
held-out text.
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
    """Fits the scorers once, then measures any number of sample sets.

    Args:
        train: (tokens,) ids of the training text, with the EOS tokens between documents.
        held_out: (rows, length) ids of real text that the generators have not seen. The even rows fit the second scorer and
            are the reference of the distribution metrics; the odd rows, `held_out_rows`, show how real text scores.
        vocab_size: ids are 0 … vocab_size − 1.
        order: order of the Kneser–Ney scorers.

    Raises:
        ValueError: fewer than two held-out rows.
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
        """Computes all unconditional metrics of samples (a list of 1-d id arrays, or (rows, length)).

        Returns:
            kn_perplexity (scorer fitted on training text), kn_perplexity_held_out (scorer fitted on held-out text),
            entropy (nats), distinct_1 … 4, self_bleu, js_1 … 3 (bits), auc (NaN with fewer than 5 rows a side),
            overlap_8, overlap_16, longest_match, mean_longest_match, tokens. If only kn_perplexity is low, the samples are
            copied from the training text.

        Raises:
            ValueError: there are no samples.
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
    """Returns the first rows that hold at least `tokens` tokens, or all rows."""
    return list(rows[: max(1, -(-tokens // rows.shape[1]))])
