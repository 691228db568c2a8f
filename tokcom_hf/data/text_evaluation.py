"""The text an evaluation needs: training tokens for the scorers, held-out rows as the reference."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .text import Corpus, TextRows, load_text_rows


@dataclass
class TextSource:
    """Where the text comes from; must be what the model was trained on, for its split to be the model's split."""

    train_file: str | None = field(default=None, metadata={"help": "Text (.txt) or JSON lines (.jsonl)."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out text of its own; all of train_file is training text then."}
    )
    text_column: str = field(default="text", metadata={"help": "Field of JSON lines and Hub data sets."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    streaming: bool = field(default=False, metadata={"help": "Read the Hub data set as a stream, if training did."})
    max_documents: int | None = field(default=None, metadata={"help": "Stop reading after so many documents."})
    validation_share: float = field(default=0.05, metadata={"help": "Share of the documents held out."})
    split_seed: int = field(default=42, metadata={"help": "The --seed of the training run, which drew the split."})


def load_source(source: TextSource, length: int, tokenizer: str | None, vocab_size: int = 2048) -> TextRows:
    """Packed training and held-out rows of `length` tokens under a tokenizer (folder or name; None trains one)."""
    if source.validation_file is not None and tokenizer is None:
        raise ValueError("With validation_file name a tokenizer too (a folder or a Hub name).")
    shared = {item.name: getattr(source, item.name) for item in fields(source) if item.name != "split_seed"}
    corpus = Corpus(**shared, seed=source.split_seed)
    return load_text_rows(corpus, tokenizer, vocab_size, length, chunk_size=1)


def full_rows(dataset: Any) -> np.ndarray:
    """The rows of a `PackedTextDataset` that hold no padding, (rows, length).

    Raises:
        ValueError: fewer than two whole rows.
    """
    count = len(dataset.token_ids) // dataset.length
    if count < 2:
        raise ValueError(
            f"The held-out text fills {count} rows of {dataset.length} tokens; two are needed. Give more text."
        )
    return dataset.token_ids[: count * dataset.length].reshape(count, dataset.length).astype(np.int64)
