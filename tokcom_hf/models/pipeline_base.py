"""BatchedPipeline: batching, threads, keyword checks and saving for every pipeline of the package."""

import difflib
import os
import types
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import RLock
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Pipeline

from .pipeline_files import save_pipeline

# A fast tokenizer stores padding and truncation on itself, so calls of two threads must not overlap.
TOKENIZER_LOCK = RLock()


class BatchedPipeline(Pipeline):
    """A pipeline whose steps take and return a batch, a list of rows.

    - One input gives one result; a list, a tuple or another iterable gives a list of results.
    - Generators and data sets (`torch.utils.data.Dataset`, `KeyDataset`, `datasets.Dataset`) give an iterator, which reads
      them batch by batch.
    - `batch_size` rows run at once, and `num_workers` threads prepare the next batches.
    - A call leaves no state on the pipeline or the model, so threads may share one pipeline.

    Subclasses set `family` and `default_batch_size` (None: a whole list at once), and define `_is_single`,
    `_sanitize_parameters`, and the steps `preprocess`, `_forward` and `postprocess` on lists.
    """

    family: str
    default_batch_size: int | None = 1
    tokenizer: Any
    image_processor: Any
    processor: Any
    # transformers annotates these as None, their value in its base class.
    _load_tokenizer: bool | None = False  # type: ignore[assignment]
    _load_processor: bool | None = False  # type: ignore[assignment]
    _load_image_processor: bool | None = False  # type: ignore[assignment]
    _load_video_processor: bool | None = False  # type: ignore[assignment]
    _load_feature_extractor: bool | None = False  # type: ignore[assignment]
    # True would let transformers take generation options away at construction.
    _pipeline_calls_generate = False

    def __init__(self, *args, **kwargs):
        # transformers loads a part that is named by a string, but not one that is named by a path object.
        loaders = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor, "processor": AutoProcessor}
        for name, loader in loaders.items():
            if isinstance(kwargs.get(name), os.PathLike):
                kwargs[name] = loader.from_pretrained(kwargs[name])
        super().__init__(*args, **kwargs)

    def _is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is one row, rather than several."""
        raise NotImplementedError

    def _dataset_row(self, row: Any) -> Any:
        """A row of `datasets.Dataset` → an input of the pipeline."""
        return row

    def _parameters(self, kwargs: dict) -> tuple[dict, dict, dict]:
        """Keywords of the three steps: those given at construction, overridden by those of the call."""
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        return (
            {**self._preprocess_params, **preprocess},
            {**self._forward_params, **forward},
            {**self._postprocess_params, **postprocess},
        )

    def __call__(  # type: ignore[override]  # no *args: transformers ignores them
        self, inputs, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs
    ):
        """One result for one input, a list for several, an iterator for a generator or a data set.

        Raises:
            TypeError: a keyword is unknown, or `inputs` is neither one input nor several.
            ValueError: `batch_size` is below 1, or `num_workers` below 0.
        """
        parameters = self._parameters(kwargs)
        size = self._batch_size if batch_size is None else batch_size
        workers = (self._num_workers if num_workers is None else num_workers) or 0
        if (size is not None and size < 1) or workers < 0:
            raise ValueError(f"batch_size must be at least 1 and num_workers at least 0, got {size} and {workers}.")
        if self._is_single(inputs):
            return self.run_single([inputs], *parameters)[0]
        if _is_lazy(inputs):
            read = _rows_of(inputs, self._dataset_row)
            return self._results(read, size or self.default_batch_size or 1, workers, parameters)
        if isinstance(inputs, dict) or not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
            raise TypeError(f"This pipeline takes one input or a list of them, got {type(inputs).__name__}.")
        rows = list(inputs)
        size = size or self.default_batch_size or max(1, len(rows))
        return list(self._results(rows, size, workers, parameters))

    def _results(self, rows: Iterable, size: int, workers: int, parameters: tuple[dict, dict, dict]) -> Iterator:
        preprocess, forward, postprocess = parameters
        for batch in _prepared(_batches(rows, size), lambda batch: self.preprocess(batch, **preprocess), workers):
            yield from self.postprocess(self.forward(batch, **forward), **postprocess)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves all parts and the code, which `pipeline(model=folder, trust_remote_code=True)` loads.

        Args:
            save_directory: folder.
            kwargs: passed to the model's `save_pretrained`.
        """
        save_pipeline(self, save_directory, self.family, **kwargs)


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first of `names` that is not in `known`, and suggests the nearest known name."""
    known = sorted(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        meant = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {meant[0]!r}?" if meant else f"; this pipeline takes {', '.join(known)}."
        raise TypeError(f"Unknown argument {unknown[0]!r}{hint}")


def _is_lazy(inputs: Any) -> bool:
    return isinstance(inputs, types.GeneratorType | Dataset) or _is_hub_dataset(inputs)


def _is_hub_dataset(inputs: Any) -> bool:
    # By name, because a pipeline runs without the `datasets` library.
    return type(inputs).__module__.split(".")[0] == "datasets"


def _rows_of(inputs, dataset_row) -> Iterator:
    if _is_hub_dataset(inputs):
        yield from (dataset_row(row) for row in inputs)
    elif isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        yield from (inputs[index] for index in range(len(inputs)))
    else:
        yield from inputs


def _batches(rows: Iterable, size: int) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _prepared(batches: Iterator[list], prepare, workers: int) -> Iterator:
    """Yields `prepare(batch)` of each batch in order; `workers` threads compute the next ones ahead."""
    if not workers:
        yield from map(prepare, batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(prepare, batch) for batch in islice(batches, 2 * workers))
        while waiting:
            ready = waiting.popleft().result()
            waiting.extend(pool.submit(prepare, batch) for batch in islice(batches, 1))
            yield ready


def generator_of(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    """The generator of one call: `generator`; or a new one seeded by `seed`, or by a draw of the global generator.

    Without either argument transformers' `set_seed` makes the output reproducible; with one of them, the global generator is
    neither read nor seeded.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("Give either seed or generator, not both.")
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def check_texts(texts: list[str]) -> None:
    """Refuses text that UTF-8 cannot encode; the error of a tokenizer would not name the place.

    Raises:
        ValueError: a text holds half of a surrogate pair, as broken JSON escapes do.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text {text!r} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, "
                "which is no character; remove it or restore its other half."
            ) from error
