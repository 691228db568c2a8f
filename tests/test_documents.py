"""docs/documents.md: every documented item has a place, a command or a call, and a test."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import tokcom_hf

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "documents.md"
COLUMNS = ("number", "item", "where", "call", "test", "works")


def rows() -> list[dict[str, str]]:
    """The rows of all tables; a vertical bar inside a cell is written `\\|`."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("|") and cells[0] not in ("#", "---"):
            assert len(cells) == len(COLUMNS), f"{len(cells)} cells: {line}"
            found.append(dict(zip(COLUMNS, cells)))
    return found


ROWS = rows()


@cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_enough_rows_and_enough_that_work():
    assert len(ROWS) >= 150
    assert sum(row["works"] == "yes" for row in ROWS) >= 145
    numbers = [row["number"] for row in ROWS]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["number"])
def test_every_row_names_a_place_and_a_test_that_exist(row):
    assert row["item"] and row["call"], "an item and what to type"
    places = quoted(row["where"])
    assert places, "a place in backquotes"
    for place in places:
        if "/" in place or place.endswith((".py", ".md", ".yaml")):
            assert (ROOT / place).exists(), f"no file {place}"
        else:
            target = tokcom_hf
            for part in place.split("."):
                target = getattr(target, part)
    tests = quoted(row["test"])
    assert tests, "a test in backquotes"
    for test in tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), f"no file {path}"
        assert name.startswith("test_") and name in functions_of(ROOT / path), f"no test {name} in {path}"
    if row["works"] != "yes":
        assert re.search(r"\d", row["works"]), "a row that differs gives its measured reason"
