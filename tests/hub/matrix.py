"""Prints the Hub matrix: every model of the package against everything the Hub and its libraries do with a model.

    python tests/hub/matrix.py                       # all cells
    python tests/hub/matrix.py --rows VQGAN --columns LoRA

`.` green, `-` not applicable, `R` red; reasons and errors below the table, the numbers in the last line. Exit code 1
where a cell is red.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import columns_files  # noqa: F401
import columns_forward  # noqa: F401
import columns_training  # noqa: F401
import torch
import transformers
from cells import COLUMNS, Bench, Cell, run_cell
from rows import ROWS

SIGNS = {"green": ".", "not applicable": "-", "red": "R"}


def table(cells: list[Cell]) -> str:
    """The table, then reasons, notes and errors, then the numbers."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows = list(dict.fromkeys(cell.row.name for cell in cells))
    states = {(cell.row.name, cell.column): cell.state for cell in cells}
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {' '.join(f'{number:2d}' for number in range(1, len(columns) + 1))}"]
    for row in rows:
        signs = "  ".join(SIGNS.get(states.get((row, column), ""), " ") for column in columns)
        lines.append(f"{row:{width}}   {signs}")
    for number, name in enumerate(columns, 1):
        mine = [cell for cell in cells if cell.column == name]
        lines.append(f"\n{number:2d} {name} ({sum(cell.seconds for cell in mine):.1f} s)")
        told: dict[str, list[str]] = {}
        for cell in mine:
            if cell.note:
                told.setdefault(f"{cell.state}: {cell.note.strip()}", []).append(cell.row.name)
        lines += [f"     {', '.join(names)} — {note}" for note, names in told.items()]
    counts = {state: sum(cell.state == state for cell in cells) for state in SIGNS}
    lines.append("")
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


def _holds(name: str, words: str) -> bool:
    return any(word in name for word in words.split(","))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose name holds one of these words (comma-separated)")
    parser.add_argument("--columns", default="", help="only columns whose name holds one of these words")
    parser.add_argument("--errors", action="store_true", help="whole tracebacks of red cells")
    wanted = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in COLUMNS:
            for row in ROWS:
                if _holds(row.name, wanted.rows) and _holds(name, wanted.columns):
                    cell = run_cell(row, name, bench)
                    if cell.state == "red" and not wanted.errors:
                        cell.note = cell.note.strip().splitlines()[-1]
                    cells.append(cell)
                    print(SIGNS[cell.state], end="", flush=True)
    print("\n" + table(cells))
    return int(any(cell.state == "red" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
