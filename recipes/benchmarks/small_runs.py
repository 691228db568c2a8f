"""Runs recipes at a small size, one after another in this process, and saves what each measured.

`troubleshooting.py` and `documented.py` consist of such runs. A run that the result file already holds is not repeated, so
an interrupted table continues where it stopped.
"""

import contextlib
import json
import re
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1]
CPU = ("--use_cpu", "true", "--disable_tqdm", "true")
# Bases of the runs: 16 vision tokens each, one for every cell of a scene; a LLaVA with 4 layers, an InternVL with 3.
SCENES = ("--num_shapes", "3", "--num_colours", "3", "--grid", "4")
SMALL_VLM = (
    *SCENES, "--min_objects", "2", "--max_objects", "4", "--image_size", "32",
    "--text.num_hidden_layers", "4", "--max_steps", "400", "--tower_steps", "100", "--eval_questions", "200",
    "--save_strategy", "no", "--threads", "1", *CPU,
)  # fmt: skip
SMALL_INTERNVL = (
    *SCENES, "--max_steps", "300", "--tower_steps", "100", "--eval_questions", "200", "--save_strategy", "no",
    "--threads", "1", *CPU,
)  # fmt: skip


@dataclass
class SmallRunArguments:
    """What is run and where it is kept."""

    output_dir: str = field(default="outputs/benchmarks/small_runs", metadata={"help": "Folder of the runs."})
    output: str = field(default="", metadata={"help": "Result file (JSON); results.json of that folder if not set."})
    only: list[str] | str | None = field(default=None, metadata={"help": "Sections to run; all where not given."})
    overwrite: bool = field(default=False, metadata={"help": "Measure again what the result file holds."})


class SmallRuns:
    """Result file and folder of one table.

    Args:
        args: the benchmark's arguments.
        sections: the names that `--only` may give.

    Raises:
        ValueError: an unknown section.
    """

    def __init__(self, args: SmallRunArguments, sections: Sequence[str]):
        only = [args.only] if isinstance(args.only, str) else args.only
        self.sections = list(only or sections)
        if unknown := sorted(set(self.sections) - set(sections)):
            raise ValueError(f"Unknown sections {unknown}; there are {', '.join(sections)}.")
        self.folder = Path(args.output_dir)
        self.path = Path(args.output or self.folder / "results.json")
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        if self.path.is_file():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
        if args.overwrite:
            self.results = {name: rows for name, rows in self.results.items() if name not in self.sections}

    def row(self, section: str, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row `name`: the saved one, or the result of `measure()` with its `seconds`, which is then saved."""
        rows = self.results.setdefault(section, {})
        if name not in rows:
            print(f"{section}: {name} …", flush=True)
            began = time.perf_counter()
            measured = dict(measure())
            rows[name] = measured | {"seconds": round(time.perf_counter() - began, 1)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        return rows[name]

    def train(self, recipe: str, name: str, arguments: Sequence[Any], output: str = "--output_dir") -> Path:
        """Runs `recipes/<recipe>.py` with these arguments into a folder of its own, its output into a log beside it."""
        folder = self.folder / "runs" / re.sub(r"\W+", "_", name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [str(argument) for argument in arguments]
        before, sys.argv = sys.argv, [f"{recipe}.py", *command, output, str(folder), "--overwrite"]
        try:
            with open(f"{folder}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="recipe")["main"]()
        finally:
            sys.argv = before
        return folder

    def base(self, recipe: str, arguments: Sequence[Any]) -> Path:
        """Folder of the small model that `recipe` trains; trains it if it is missing."""
        folder = self.folder / "runs" / recipe
        return folder if (folder / "results.json").is_file() else self.train(recipe, recipe, arguments)


def read_json(folder: Path, file: str = "results.json") -> dict[str, Any]:
    """A result file of a run."""
    return json.loads((folder / file).read_text(encoding="utf-8"))


def logged(folder: Path, name: str) -> list[float]:
    """All values that a run logged under `name`, from its `logs/training.log`."""
    pattern = re.compile(rf"[ ,]{re.escape(name)}: ([-+\w.]+)")
    text = (folder / "logs" / "training.log").read_text(encoding="utf-8")
    return [float(found.group(1)) for line in text.splitlines() if (found := pattern.search(line))]


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]], first: str = "") -> str:
    """Markdown table of `rows`; `columns` maps headings to (key, format); `–` stands for a missing value."""
    lines = ["| " + " | ".join([first, *columns]) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = ["–" if row.get(key) is None else format(row[key], style) for key, style in columns.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
