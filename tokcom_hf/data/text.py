"""Text in, packed rows of token ids out: the embedded corpus, the user's files, or a Hub data set."""

import ast
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import PackedTextDataset, pack, spread_offsets
from .text_files import is_json_lines, read_json_objects, read_text
from .tokenizers import load_tokenizer, train_tokenizer

# About as much English as the smallest common Python carries; enough to train the tiny recipe on.
EMBEDDED_BYTES = 2_000_000
FALLBACK_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "datasets", "huggingface_hub")
# Configurations of WikiText on the Hub, by whose names it is known.
WIKITEXT = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
# Documents of a stream that a new tokenizer is trained on.
TOKENIZER_DOCUMENTS = 20_000


def embedded_documents(max_bytes: int = EMBEDDED_BYTES) -> list[str]:
    """English prose that every Python installation carries: the language reference, then docstrings.

    `pydoc_data.topics` comes first, then the docstrings of the standard library, file by file in a fixed order, then, where
    a trimmed Python lacks those, docstrings of the installed dependencies. Sources are parsed, never imported.
    """
    documents: list[str] = []
    try:
        from pydoc_data.topics import topics

        documents += [text.strip() for _, text in sorted(topics.items())]
    except ImportError:
        pass
    size = sum(map(len, documents))
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in FALLBACK_PACKAGES:
        spec = find_spec(package)
        roots += [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
    with tqdm(total=max_bytes, initial=size, desc="reading docstrings", unit="B", unit_scale=True, delay=2) as bar:
        for file in chain.from_iterable(map(_source_files, roots)):
            if size >= max_bytes:
                break
            text = "\n\n".join(_docstrings(file))
            if len(text) > 200:
                documents.append(text)
                size += len(text)
                bar.update(len(text))
    return documents


def _source_files(root: Path) -> list[Path]:
    """Python files below `root` in a fixed order, without tests and installed packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "test", "tests")]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text


def iterate_documents(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Iterator[str]:
    """Yields documents; with neither a file nor a data set, the embedded ones. Blank documents are left out.

    A `.jsonl`, `.ndjson` or `.json` file gives one document per line (its `text_column`), any other file is text whose
    documents are separated by two or more blank lines, or is one document. `streaming` reads a Hub data set without
    downloading all of it.

    Raises:
        ValueError: both sources given, a `max_documents` below 1, a compressed file or a table, text that is not UTF-8, a
            JSON line that is broken or lacks the field (file and line are named), or a data set without the column.
        OSError: a file or data set that cannot be read.
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


def load_documents(train_file: str | None = None, dataset_name: str | None = None, **options: Any) -> list[str]:
    """The documents of `iterate_documents` (same arguments, same errors) as a list.

    Raises:
        ValueError: no text at all.
    """
    found = list(iterate_documents(train_file, dataset_name, **options))
    if not found:
        raise ValueError(f"The corpus is empty: {train_file or dataset_name or 'this Python'} holds no text.")
    return found


def read_json_lines(path: str | Path, text_column: str = "text") -> Iterator[str]:
    """The field `text_column` of every line of a JSON lines file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: what `text_files.read_json_objects` refuses, or a line without text in that field; the line is named.
    """
    for place, row in read_json_objects(path):
        if not isinstance(row.get(text_column), str):
            raise ValueError(f"{place}: no text field {text_column!r}; name it with --text_column.")
        yield row[text_column]


def _split_blank(text: str) -> list[str]:
    parts = [part.strip("\n") for part in text.split("\n\n\n")]
    return [part for part in parts if part.strip()]


def hub_dataset(name: str | None, config: str | None = None) -> tuple[str | None, str | None]:
    """Hub name and configuration of a data set; `wikitext-2-raw-v1` and its like stand for those of WikiText.

    Raises:
        ValueError: such a name with another configuration.
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
    """Training rows, held-out rows, and the tokenizer that wrote them."""

    train: PackedTextDataset
    validation: PackedTextDataset
    tokenizer: Any


def split_documents(documents: list[str], validation_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Seeded split by documents; a corpus of fewer than 20 documents is first cut into about 200 pieces.

    Returns:
        (training documents, held-out documents), each in the order of the corpus.

    Raises:
        ValueError: `validation_share` outside (0, 1).
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
    """Yields the training documents of a stream and appends the others to `held_out`; the seed decides which."""
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


def load_text_rows(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    streaming: bool = False,
    max_documents: int | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    vocab_size: int = 2048,
    length: int = 1024,
    chunk_size: int = 4,
    validation_share: float = 0.05,
    seed: int = 0,
    offset_copies: int = 1,
    validation_file: str | None = None,
) -> TextRows:
    """Documents → tokenizer (loaded by name, or trained on the training documents) → packed rows.

    With `streaming` the documents are tokenized as they arrive and only their ids (4 bytes per token) and the held-out
    documents are kept; `max_documents` ends the stream. A new tokenizer is then trained on its first 20,000 documents.
    `offset_copies` > 1 gives the training text that many times, cut at other places (`packing.spread_offsets`).
    `validation_file` is held-out text of its own; nothing is then split off.

    Raises:
        ValueError: `chunk_size` does not divide `length`, empty corpus, or less text than one chunk.
        OSError: unknown tokenizer, unreadable file.
    """
    if chunk_size < 1 or length < 1 or length % chunk_size:
        raise ValueError(f"The row length must be a positive multiple of chunk_size={chunk_size}, got {length}.")
    options: dict[str, Any] = {"dataset_config": dataset_config, "text_column": text_column}
    options |= {"streaming": streaming, "max_documents": max_documents}
    offsets = spread_offsets(offset_copies, length, chunk_size, seed)
    held_out: list[str]
    train: Iterable[str]
    if validation_file is not None:
        train = sample = load_documents(train_file, dataset_name, **options)
        held_out = load_documents(validation_file, text_column=text_column)
    elif streaming and dataset_name:
        held_out = []
        train = split_stream(iterate_documents(train_file, dataset_name, **options), validation_share, seed, held_out)
        sample = [] if tokenizer else list(islice(train, TOKENIZER_DOCUMENTS))
        train = chain(sample, train)
    else:
        sample, held_out = split_documents(load_documents(train_file, dataset_name, **options), validation_share, seed)
        train = sample
    loaded = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(sample, vocab_size)
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
