"""Text in, packed rows of token ids out: the embedded corpus, the user's files, or a Hub data set."""

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .tokenizers import load_tokenizer, train_tokenizer

# About as much English as the smallest common Python carries; enough to train the tiny recipe on.
EMBEDDED_BYTES = 2_000_000
FALLBACK_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "datasets", "huggingface_hub")


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
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            if size >= max_bytes:
                return documents
            relative = file.relative_to(root).parts
            if "site-packages" in relative or "test" in relative or "tests" in relative:
                continue
            text = "\n\n".join(_docstrings(file))
            if len(text) > 200:
                documents.append(text)
                size += len(text)
    return documents


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


def load_documents(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = False,
    max_documents: int | None = None,
) -> list[str]:
    """Reads documents; with neither a file nor a data set, the embedded ones.

    A `.jsonl` file gives one document per line (its `text_column`), any other file is text whose documents are separated
    by two or more blank lines, or is one document.

    Raises:
        ValueError: both sources given, no text at all, or a JSON line that is broken or lacks the field.
        OSError: a file that cannot be read.
    """
    if train_file and dataset_name:
        raise ValueError("Give either train_file or dataset_name, not both.")
    documents: Iterable[str]
    if train_file:
        documents = _file_documents(Path(train_file), text_column)
    elif dataset_name:
        from datasets import load_dataset

        rows = load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
        documents = _column(rows, text_column, dataset_name)
    else:
        documents = embedded_documents()
    found = [text for text in islice(documents, max_documents) if text.strip()]
    if not found:
        raise ValueError(f"The corpus is empty: {train_file or dataset_name or 'this Python'} holds no text.")
    return found


def _file_documents(path: Path, text_column: str) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"Text file {str(path)!r} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if path.suffix != ".jsonl":
        yield from _split_blank(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}).") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            raise ValueError(f"{path}, line {number}: no text field {text_column!r}; name it with --text_column.")
        yield row[text_column]


def _split_blank(text: str) -> list[str]:
    parts = [part.strip("\n") for part in text.replace("\r\n", "\n").split("\n\n\n")]
    return [part for part in parts if part.strip()]


def _column(rows: Iterable[dict[str, Any]], text_column: str, name: str) -> Iterator[str]:
    for row in rows:
        if text_column not in row:
            raise ValueError(f"Data set {name!r} has no column {text_column!r}; it has {', '.join(row)}.")
        yield row[text_column]


class PackedTextDataset(torch.utils.data.Dataset):
    """Documents joined with EOS and cut into rows of `length` tokens.

    Items are `input_ids (length,)` and `attention_mask (length,)`; only the last row may hold padding (mask 0).
    """

    def __init__(self, token_ids: np.ndarray, length: int, pad_token_id: int):
        self.token_ids, self.length, self.pad_token_id = token_ids, length, pad_token_id

    def __len__(self) -> int:
        return -(-len(self.token_ids) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = torch.from_numpy(self.token_ids[index * self.length : (index + 1) * self.length].astype(np.int64))
        missing = self.length - len(row)
        mask = torch.ones(self.length, dtype=torch.long)
        if missing:
            mask[-missing:] = 0
            row = torch.nn.functional.pad(row, (0, missing), value=self.pad_token_id)
        return {"input_ids": row, "attention_mask": mask}


def pack(documents: list[str], tokenizer: Any, length: int, description: str = "tokenizing") -> PackedTextDataset:
    """Tokenizes documents, puts EOS after each, and cuts them into rows of `length` tokens."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no EOS token to put between documents.")
    pieces: list[np.ndarray] = []
    batches = range(0, len(documents), 256)
    for start in tqdm(batches, desc=description, unit="batch", disable=len(documents) < 1000):
        encoded = tokenizer(documents[start : start + 256], add_special_tokens=False, verbose=False).input_ids
        pieces += [np.asarray([*ids, eos], dtype=np.int32) for ids in encoded if ids]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    return PackedTextDataset(ids, length, eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@dataclass
class TextRows:
    """Training rows, held-out rows, and the tokenizer that wrote them."""

    train: PackedTextDataset
    validation: PackedTextDataset
    tokenizer: Any


def split_documents(documents: list[str], validation_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Seeded split by documents; a corpus of fewer than 20 is cut at paragraphs first."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be in (0, 1), got {validation_share}.")
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


def load_text_rows(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    streaming: bool = False,
    max_documents: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 2048,
    length: int = 1024,
    chunk_size: int = 4,
    validation_share: float = 0.05,
    seed: int = 0,
) -> TextRows:
    """Documents → tokenizer (loaded by name, or trained on the training documents) → packed rows.

    Raises:
        ValueError: `chunk_size` does not divide `length`, empty corpus, or less text than one chunk.
        OSError: unknown tokenizer, unreadable file.
    """
    if length < 1 or length % chunk_size:
        raise ValueError(f"The row length must be a positive multiple of chunk_size={chunk_size}, got {length}.")
    documents = load_documents(
        train_file, dataset_name, dataset_config, text_column, streaming=streaming, max_documents=max_documents
    )
    train, validation = split_documents(documents, validation_share, seed)
    loaded = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, vocab_size)
    rows = TextRows(
        pack(train, loaded, length, "tokenizing training text"),
        pack(validation, loaded, length, "tokenizing held-out text"),
        loaded,
    )
    for name, part in (("training", rows.train), ("held-out", rows.validation)):
        if len(part.token_ids) < chunk_size:
            raise ValueError(
                f"The {name} text is shorter than a chunk: {len(part.token_ids)} tokens, {chunk_size} needed."
            )
    return rows
