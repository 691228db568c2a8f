"""Options for the text of a recipe, and its packed rows: training data of a model, or reference text of an evaluation."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .text import Corpus, TextRows, hub_dataset, load_text_rows
from .text_files import is_json_lines


@dataclass
class TextSource:
    """Where text comes from. For an evaluation, give the source of the training run, so that the split is the same."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text (.txt) or JSON lines (.jsonl); replaces a data set named in the configuration file.",
            "replaces": ("dataset_name", "dataset_config"),
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File of held-out text; all other text is then training text."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Field of JSON lines and Hub data sets that holds the text."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set on the Hub, or a configuration of WikiText, for example wikitext-2-raw-v1.",
            "replaces": ("train_file", "dataset_config"),
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the Hub data set as a stream, without downloading all of it."}
    )
    max_documents: int | None = field(default=None, metadata={"help": "Read at most this many documents."})
    validation_share: float = field(
        default=0.05, metadata={"help": "Share of the documents held out, without a validation file."}
    )
    split_seed: int = field(
        default=42,
        metadata={"help": "Seed of the split into training and held-out text: the --seed of the training run."},
    )

    def __post_init__(self):
        self.dataset_name, self.dataset_config = hub_dataset(self.dataset_name, self.dataset_config)
        if not 0.0 < self.validation_share < 1.0:
            raise ValueError(f"validation_share must lie between 0 and 1, got {self.validation_share}.")
        if self.dataset_name is not None:
            return
        for name in ("dataset_config", "streaming"):
            if getattr(self, name):
                given = f"{name}={getattr(self, name)!r}"
                raise ValueError(
                    f"{given} is for a data set on the Hub; name it with dataset_name, or leave {name} out."
                )
        files = [Path(file) for file in (self.train_file, self.validation_file) if file]
        if self.text_column != "text" and not any(is_json_lines(file) for file in files):
            raise ValueError(
                f"text_column={self.text_column!r} is for JSON lines and data sets on the Hub; plain text has no columns."
            )


def load_source(
    source: TextSource,
    length: int,
    tokenizer: str | None,
    vocab_size: int = 2048,
    chunk_size: int = 1,
    offset_copies: int = 1,
) -> TextRows:
    """Loads the packed training and held-out rows of a source.

    Args:
        source: documents and their split.
        length: tokens per row, a multiple of `chunk_size`.
        tokenizer: folder or Hub name; None trains a tokenizer of at most `vocab_size` tokens.
        chunk_size: tokens per chunk.
        offset_copies: number of copies of the training text, each cut into chunks at other places.
    """
    shared = {item.name: getattr(source, item.name) for item in fields(Corpus) if item.name != "seed"}
    corpus = Corpus(**shared, seed=source.split_seed)
    return load_text_rows(corpus, tokenizer, vocab_size, length, chunk_size, offset_copies)


def full_rows(dataset: Any) -> np.ndarray:
    """Returns the rows of a `PackedTextDataset` that hold no padding, (rows, length) int64.

    Raises:
        ValueError: there are fewer than two such rows.
    """
    count = len(dataset.token_ids) // dataset.length
    if count < 2:
        raise ValueError(
            f"The held-out text fills {count} rows of {dataset.length} tokens; at least 2 are needed. Give more text."
        )
    return dataset.token_ids[: count * dataset.length].reshape(count, dataset.length).astype(np.int64)
