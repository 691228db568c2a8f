"""Where a recipe's text comes from, and its rows: what a model trains on, or what an evaluation of it compares with."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .text import Corpus, TextRows, hub_dataset, load_text_rows


@dataclass
class TextSource:
    """Where text comes from. An evaluation names what the model was trained on, for its split to be the model's split."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text (.txt) or JSON lines (.jsonl), in place of a data set that the file names.",
            "replaces": ("dataset_name", "dataset_config"),
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out text of its own; all other text is training text then."}
    )
    text_column: str = field(default="text", metadata={"help": "Field of JSON lines and Hub data sets."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set on the Hub; a configuration of WikiText, as wikitext-2-raw-v1, stands for itself.",
            "replaces": ("train_file", "dataset_config"),
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    streaming: bool = field(default=False, metadata={"help": "Read the Hub data set as a stream."})
    max_documents: int | None = field(default=None, metadata={"help": "Stop reading after so many documents."})
    validation_share: float = field(default=0.05, metadata={"help": "Share of the documents held out."})
    split_seed: int = field(default=42, metadata={"help": "The --seed of the training run, which drew the split."})

    def __post_init__(self):
        self.dataset_name, self.dataset_config = hub_dataset(self.dataset_name, self.dataset_config)


def load_source(
    source: TextSource,
    length: int,
    tokenizer: str | None,
    vocab_size: int = 2048,
    chunk_size: int = 1,
    offset_copies: int = 1,
) -> TextRows:
    """Packed training and held-out rows of a source.

    Args:
        source: documents and their split.
        length: tokens per row, a multiple of `chunk_size`.
        tokenizer: folder or name; None trains one of `vocab_size` tokens.
        chunk_size: tokens per chunk, of which `offset_copies` > 1 gives the training text cut at other places.
    """
    shared = {item.name: getattr(source, item.name) for item in fields(Corpus) if item.name != "seed"}
    corpus = Corpus(**shared, seed=source.split_seed)
    return load_text_rows(corpus, tokenizer, vocab_size, length, chunk_size, offset_copies)


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
