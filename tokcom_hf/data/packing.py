"""Packs documents into rows of token ids: joined with EOS, cut every `length` tokens, the last row padded and masked."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

# Documents per call of the tokenizer, which tokenizes a batch in parallel.
BATCH_DOCUMENTS = 256


class PackedTextDataset(torch.utils.data.Dataset):
    """Token ids cut into rows of `length` tokens, once per offset.

    Items are `input_ids (length,)` and `attention_mask (length,)`, both int64; only the last row of an offset may hold
    padding (mask 0). The ids are kept as one int32 array; rows are made on access.

    Args:
        token_ids: (tokens,) int32, documents with EOS after each.
        length: tokens per row.
        pad_token_id: id that fills the last row.
        offsets: positions in `token_ids` at which the first row begins. Each offset adds one copy of the corpus, whose chunk
            borders lie elsewhere (`spread_offsets`).
    """

    def __init__(self, token_ids: np.ndarray, length: int, pad_token_id: int, offsets: tuple[int, ...] = (0,)):
        self.token_ids, self.length, self.pad_token_id, self.offsets = token_ids, length, pad_token_id, offsets
        self._starts = [0]
        for offset in offsets:
            self._starts.append(self._starts[-1] + max(0, -(-(len(token_ids) - offset) // length)))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of a data set of {len(self)} rows.")
        copy = bisect_right(self._starts, index) - 1
        start = self.offsets[copy] + (index - self._starts[copy]) * self.length
        return make_row(self.token_ids[start : start + self.length], self.length, self.pad_token_id)


class StreamedTextDataset(torch.utils.data.IterableDataset):
    """Packs documents into rows while training reads them, for corpora that fit neither memory nor disk.

    Items are those of `PackedTextDataset`. Training needs `max_steps`, because the number of rows is unknown. With n
    workers, each takes every n-th document.

    Args:
        documents: function that returns an iterable of strings, called once per epoch. It must be picklable where workers
            are spawned (macOS, Windows), for example `functools.partial(iterate_documents, "corpus.txt")`.
        tokenizer: tokenizer with an EOS token.
        length: tokens per row.
    """

    def __init__(self, documents: Callable[[], Iterable[str]], tokenizer: Any, length: int):
        self.documents, self.tokenizer, self.length = documents, tokenizer, length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        documents = iter(self.documents())
        if worker is not None:
            documents = islice(documents, worker.id, None, worker.num_workers)
        rest = np.zeros(0, dtype=np.int32)
        for piece in tokenize(documents, self.tokenizer):
            rest = np.concatenate([rest, piece])
            whole = len(rest) // self.length * self.length
            for start in range(0, whole, self.length):
                yield make_row(rest[start : start + self.length], self.length, padding_id(self.tokenizer))
            rest = rest[whole:]
        if len(rest):
            yield make_row(rest, self.length, padding_id(self.tokenizer))


def make_row(ids: np.ndarray, length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads ids (≤ length,) on the right; returns `input_ids` and `attention_mask`, both (length,) int64."""
    row = torch.from_numpy(ids.astype(np.int64))
    mask = torch.ones(length, dtype=torch.long)
    missing = length - len(row)
    if missing:
        mask[-missing:] = 0
        row = torch.nn.functional.pad(row, (0, missing), value=pad_token_id)
    return {"input_ids": row, "attention_mask": mask}


def padding_id(tokenizer: Any) -> int:
    """Returns the tokenizer's padding id, or its EOS id where it has no padding token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def tokenize(documents: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yields the ids of 256 documents at a time, (tokens,) int32, with EOS after each document.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no EOS token to put between documents.")
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
        ids = [token for row in encoded if row for token in (*row, eos)]
        yield np.asarray(ids, dtype=np.int32)


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    length: int,
    description: str = "tokenizing",
    offsets: tuple[int, ...] = (0,),
) -> PackedTextDataset:
    """Tokenizes documents, puts EOS after each, and cuts them into rows of `length` tokens.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    pieces: list[np.ndarray] = []
    with tqdm(desc=description, unit=" tokens", unit_scale=True, delay=2) as bar:
        for piece in tokenize(documents, tokenizer):
            pieces.append(piece)
            bar.update(len(piece))
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    return PackedTextDataset(ids, length, padding_id(tokenizer), offsets)


def spread_offsets(copies: int, length: int, chunk_size: int, seed: int) -> tuple[int, ...]:
    """Returns `copies` seeded row offsets in [0, length): the first is 0, and copy i has remainder i modulo `chunk_size`.

    With `copies` ≥ `chunk_size`, every token of the text begins a chunk in at least one copy.

    Raises:
        ValueError: `copies` below 1.
    """
    if copies < 1:
        raise ValueError(f"offset_copies must be at least 1, got {copies}.")
    draw = random.Random(seed)
    chunks = length // chunk_size
    return (0, *(draw.randrange(chunks) * chunk_size + copy % chunk_size for copy in range(1, copies)))
