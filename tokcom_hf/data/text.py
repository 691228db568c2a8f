"""Loads text (the embedded corpus, the user's files, or a Hub data set) and packs it into rows of token ids."""

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .embedded_text import embedded_documents
from .packing import PackedTextDataset, pack, spread_offsets
from .text_files import is_json_lines, read_json_objects, read_text
from .tokenizers import load_tokenizer, train_tokenizer

# Configurations of WikiText on the Hub; their names are accepted as names of data sets.
WIKITEXT = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
# Number of documents of a stream that a new tokenizer is trained on.
TOKENIZER_DOCUMENTS = 20_000


def iterate_documents(
    train_file: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Iterator[str]:
    """Yields the documents of a file or a Hub data set, or else of the embedded corpus. Blank documents are left out.

    A `.jsonl`, `.ndjson` or `.json` file holds one document per line, in the field `text_column`. Any other file is plain
    text, whose documents are separated by two or more blank lines. `streaming` reads a Hub data set without downloading all
    of it.

    Raises:
        ValueError: both sources are given, `max_documents` is below 1, the file is compressed or a table, text is not UTF-8,
            a JSON line is broken or lacks the field (the message names file and line), or a data set lacks the column.
        OSError: the file or data set cannot be read.
    """
    if train_file and dataset_name:
        raise ValueError("Give either train_file or dataset_name, not both.")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}.")
    documents: Iterable[str]
    if train_file:
        path = Path(train_file)
        documents = read_json_lines(path, text_column) if is_json_lines(path) else _split_blank(read_text(path))
    elif dataset_name:
        documents = _hub_documents(dataset_name, dataset_config, text_column, split, streaming)
    else:
        documents = embedded_documents()
    return (text for text in islice(documents, max_documents) if text.strip())


def load_documents(
    train_file: str | os.PathLike | None = None, dataset_name: str | None = None, **options: Any
) -> list[str]:
    """Returns the documents of `iterate_documents` (same arguments, same errors) as a list.

    Raises:
        ValueError: there is no text at all.
    """
    found = list(iterate_documents(train_file, dataset_name, **options))
    if not found:
        raise ValueError(f"The corpus is empty: {train_file or dataset_name or 'this Python'} holds no text.")
    return found


def read_json_lines(path: str | Path, text_column: str = "text") -> Iterator[str]:
    """Yields the field `text_column` of every line of a JSON lines file.

    Raises:
        OSError: the file cannot be read.
        ValueError: `text_files.read_json_objects` refuses a line, or a line has no text in that field; the message names
            the line.
    """
    for place, row in read_json_objects(path):
        if not isinstance(row.get(text_column), str):
            raise ValueError(f"{place}: no text field {text_column!r}; name it with --text_column.")
        yield row[text_column]


def _split_blank(text: str) -> list[str]:
    parts = [part.strip("\n") for part in text.split("\n\n\n")]
    return [part for part in parts if part.strip()]


def hub_dataset(name: str | None, config: str | None = None) -> tuple[str | None, str | None]:
    """Returns Hub name and configuration of a data set; configurations of WikiText are accepted as names.

    Raises:
        ValueError: `name` is a configuration of WikiText and `config` is another one.
    """
    if name not in WIKITEXT:
        return name, config
    if config not in (None, name):
        raise ValueError(f"dataset_name {name!r} is WikiText's configuration {name!r}; leave dataset_config out.")
    return "Salesforce/wikitext", name


def _hub_documents(name: str, config: str | None, text_column: str, split: str, streaming: bool) -> Iterator[str]:
    from datasets import load_dataset

    repo, config = hub_dataset(name, config)
    try:
        rows = load_dataset(repo, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"Data set {name!r} cannot be loaded: {reason}") from None
    for row in rows:
        if text_column not in row:
            raise ValueError(f"Data set {name!r} has no column {text_column!r}; it has {', '.join(row)}.")
        if not isinstance(row[text_column], str):
            kind = type(row[text_column]).__name__
            raise ValueError(
                f"Column {text_column!r} of data set {name!r} holds {kind}, not text; name another column."
            )
        yield row[text_column]


@dataclass
class TextRows:
    """Training rows, held-out rows, and the tokenizer that made their ids."""

    train: PackedTextDataset
    validation: PackedTextDataset
    tokenizer: Any


def split_documents(documents: list[str], validation_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Splits documents by a seed; a corpus of fewer than 20 documents is first cut into about 200 pieces.

    Returns:
        (training documents, held-out documents), each in the order of the corpus.

    Raises:
        ValueError: `validation_share` is outside (0, 1).
    """
    _check_share(validation_share)
    if len(documents) < 20:
        text = "\n\n".join(documents)
        size = max(1, len(text) // 200)
        documents = [text[start : start + size] for start in range(0, len(text), size)]
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    count = max(1, round(validation_share * len(documents)))
    held = set(order[:count])
    train = [text for index, text in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)]


def split_stream(documents: Iterable[str], validation_share: float, seed: int, held_out: list[str]) -> Iterator[str]:
    """Yields the training documents of a stream and appends the held-out ones to `held_out`; the seed decides."""
    _check_share(validation_share)
    draw = random.Random(seed)
    for text in documents:
        if draw.random() < validation_share:
            held_out.append(text)
        else:
            yield text


def _check_share(validation_share: float) -> None:
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be in (0, 1), got {validation_share}.")


@dataclass(frozen=True)
class Corpus:
    """Where text comes from and which part of it is held out.

    Args:
        train_file, dataset_name, dataset_config, text_column, streaming, max_documents: see `iterate_documents`.
        validation_file: file of held-out text; all other documents are then training text.
        validation_share: share of the documents that is held out where there is no `validation_file`, in (0, 1).
        seed: seed of that split.
    """

    train_file: str | os.PathLike | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    text_column: str = "text"
    streaming: bool = False
    max_documents: int | None = None
    validation_file: str | os.PathLike | None = None
    validation_share: float = 0.05
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Returns the arguments of `iterate_documents` other than the file and the data set."""
        names = ("dataset_config", "text_column", "streaming", "max_documents")
        return {name: getattr(self, name) for name in names}


def load_text_rows(
    corpus: Corpus | str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    vocab_size: int = 2048,
    length: int = 1024,
    chunk_size: int = 4,
    offset_copies: int = 1,
    **changes: Any,
) -> TextRows:
    """Loads documents and a tokenizer (or trains one on the training documents), and packs both splits into rows.

    With `streaming`, documents are tokenized as they arrive; only their ids (4 bytes per token) and the held-out documents
    stay in memory. `max_documents` ends the stream. A new tokenizer is trained on the stream's first 20,000 documents.

    Args:
        corpus: where the text comes from, or a file of training text; None means the embedded documents.
        tokenizer: folder, Hub name or tokenizer; None trains a new tokenizer.
        vocab_size: maximum number of tokens of a new tokenizer.
        length: tokens per row, a multiple of `chunk_size`.
        chunk_size: tokens per chunk.
        offset_copies: number of copies of the training text, each cut into chunks at other places
            (`packing.spread_offsets`).
        changes: fields of `corpus` to replace, for example `train_file="corpus.txt"`.

    Raises:
        TypeError: a name in `changes` is no field of `Corpus`.
        ValueError: `chunk_size` does not divide `length`, the corpus is empty, or a split is shorter than one chunk.
        OSError: the tokenizer or a file cannot be loaded.
    """
    corpus = _changed(corpus, changes)
    if chunk_size < 1 or length < 1 or length % chunk_size:
        raise ValueError(f"The row length must be a positive multiple of chunk_size={chunk_size}, got {length}.")
    offsets = spread_offsets(offset_copies, length, chunk_size, corpus.seed)
    sample, train, held_out = _divided(corpus, tokenizer is None)
    loaded = train_tokenizer(sample, vocab_size) if tokenizer is None else load_tokenizer(tokenizer)
    rows = TextRows(
        pack(train, loaded, length, "tokenizing training text", offsets),
        pack(held_out, loaded, length, "tokenizing held-out text"),
        loaded,
    )
    for name, part in (("training", rows.train), ("held-out", rows.validation)):
        if len(part.token_ids) < chunk_size:
            raise ValueError(
                f"The {name} text is shorter than a chunk: {len(part.token_ids)} tokens, {chunk_size} needed."
            )
    return rows


def _changed(corpus: Corpus | str | os.PathLike | None, changes: dict[str, Any]) -> Corpus:
    if not isinstance(corpus, Corpus):
        corpus = Corpus(train_file=corpus)
    unknown = set(changes) - set(vars(corpus))
    if unknown:
        raise TypeError(f"Corpus has no field {', '.join(sorted(unknown))}; its fields are {', '.join(vars(corpus))}.")
    return replace(corpus, **changes)


def _divided(corpus: Corpus, sampled: bool) -> tuple[Iterable[str], Iterable[str], list[str]]:
    """Returns documents to train a tokenizer on (used where `sampled`), training documents, and held-out documents.

    For a stream, the list of held-out documents is complete only after all training documents have been read.
    """
    sources, options = (corpus.train_file, corpus.dataset_name), corpus.options()
    if corpus.streaming and corpus.dataset_name and corpus.validation_file is None:
        held_out: list[str] = []
        stream = split_stream(iterate_documents(*sources, **options), corpus.validation_share, corpus.seed, held_out)
        sample = list(islice(stream, TOKENIZER_DOCUMENTS)) if sampled else []
        return sample, chain(sample, stream), held_out
    documents = load_documents(*sources, **options)
    if corpus.validation_file is not None:
        return documents, documents, load_documents(corpus.validation_file, text_column=corpus.text_column)
    train, held_out = split_documents(documents, corpus.validation_share, corpus.seed)
    return train, train, held_out
