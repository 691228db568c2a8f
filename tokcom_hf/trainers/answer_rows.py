"""Predictions of answers in the form that `compute_metrics` reads: one row per question, padded at its end."""

import torch
from torch.nn.utils.rnn import pad_sequence


def answer_rows(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups the answers' logits by row.

    Args:
        logits: `(answer tokens, vocab)` at the positions that predict a label, of one row after the other.
        labels: `(batch, length)`, -100 where nothing is predicted.

    Returns:
        logits `(batch, longest answer, vocab)` and labels `(batch, longest answer)`, aligned; -100 behind shorter answers.
    """
    wanted = labels[:, 1:]
    counts = (wanted != -100).sum(-1).tolist()
    rows = [row[row != -100] for row in wanted]
    return (
        pad_sequence(list(logits.split(counts)), batch_first=True, padding_value=-100),
        pad_sequence(rows, batch_first=True, padding_value=-100),
    )
