"""What the cells of the Hub matrix share: built models, saved folders, processes; and the list of columns.

A column is a function `(row, bench)` that asserts its claim. It may return a note for the table; it raises
`NotApplicable` with the reason, after having checked it, where a model has nothing the column could be about.
"""

import copy
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rows import ROWS, Row, outputs, slug

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS: dict[str, Callable] = {}


class NotApplicable(Exception):
    """A model has nothing this column could be about; the message says why."""


def column(name: str) -> Callable:
    """Registers a column under the name that the table prints."""

    def register(check: Callable) -> Callable:
        COLUMNS[name] = check
        return check

    return register


@dataclass
class Cell:
    row: Row
    column: str
    state: str  # green, not applicable, red
    note: str = ""
    seconds: float = 0.0


class Bench:
    """Models and folders made once, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._models: dict[str, torch.nn.Module] = {}
        self._expected: dict[str, dict] = {}
        self._saved: dict[str, Path] = {}
        self._processes: dict[str, dict] = {}

    # ------------------------------------------------------------------ models
    def model(self, row: Row):
        """A model of its own for one cell, in eval mode."""
        if row.name not in self._models:
            self._models[row.name] = row.build()
        return copy.deepcopy(self._models[row.name])

    def expected(self, row: Row) -> dict[str, torch.Tensor]:
        """Outputs of the model as it was built."""
        if row.name not in self._expected:
            self._expected[row.name] = outputs(row, self.model(row))
        return self._expected[row.name]

    def referenced(self, row: Row):
        """A composite model whose base was loaded from a folder, which it refers to."""
        base = self.path(row, "base_model")
        built = self.model(row)
        if not base.exists():
            built.base.save_pretrained(base)
        loaded = type(built.base).from_pretrained(base).float()
        model = row.build(loaded)
        model.load_state_dict(built.state_dict())
        return model.eval()

    def kinds(self, row: Row) -> list:
        """The model, and for a composite also the one that refers to its base."""
        return [self.model(row), self.referenced(row)] if row.composite else [self.model(row)]

    def path(self, row: Row, *names: str) -> Path:
        return self.folder / slug(row.name) / "_".join(names)

    def saved(self, row: Row) -> Path:
        """A folder with the model and its tokenizer or processors."""
        if row.name not in self._saved:
            folder, model = self.path(row, "saved"), self.model(row)
            model.save_pretrained(folder)
            if row.make_part is not None:
                row.make_part(model).save_pretrained(folder)
            self._saved[row.name] = folder
        return self._saved[row.name]

    # ------------------------------------------------------------------ processes
    def process(self, kind: str) -> dict:
        """Results by row of one process for all rows: `package`, `remote` (package blocked) or `ranks` (two of them)."""
        if kind not in self._processes:
            try:
                self._processes[kind] = self._run(kind)
            except Exception as error:
                # Once is enough: every cell that needs it is red.
                self._processes[kind] = {row.name: {"error": str(error)} for row in ROWS}
        return self._processes[kind]

    def _run(self, kind: str) -> dict:
        out = self.folder / f"{kind}.pt"
        folders = {row.name: str(self.saved(row)) for row in ROWS}
        (self.folder / "folders.json").write_text(json.dumps(folders))
        command = [sys.executable]
        if kind == "ranks":
            command += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(HERE / "ranks.py")]
        else:
            command += [str(HERE / "fresh.py"), kind]
        environment = environment_of(self.folder / f"home_{kind}")
        if kind == "remote":
            environment.pop("PYTHONPATH")
        command += [str(self.folder / "folders.json"), str(out)]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{kind}: {done.stderr[-3000:]}"
        return torch.load(out, weights_only=False)


def environment_of(home: Path) -> dict[str, str]:
    """Variables of a process that has the checkout on its path, one thread, no network and caches of its own."""
    return os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def load(row: Row, folder, **options):
    """The model of a folder by its own class, in this process."""
    import tokcom_hf

    return getattr(tokcom_hf, row.model).from_pretrained(folder, **options).eval()


def in_words(error: Exception, *words: str) -> None:
    """A refusal names what it refuses: one of `words` is in its message."""
    told = str(error)
    assert len(told) > 20 and any(word in told for word in words), f"not in words: {type(error).__name__}: {told}"


@cache
def takes(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def run_cell(row: Row, name: str, bench: Bench) -> Cell:
    """Runs one cell; an error of any kind makes it red."""
    started, state = time.perf_counter(), "green"
    torch.manual_seed(0)
    try:
        note = COLUMNS[name](row, bench) or ""
    except NotApplicable as reason:
        state, note = "not applicable", str(reason)
    except Exception as error:
        state, note = "red", "".join(traceback.format_exception(error))
    return Cell(row, name, state, note, time.perf_counter() - started)
