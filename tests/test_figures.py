"""docs/figures.md: a figure of README or a page is the number in its file of results."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (ROOT / "docs" / "figures.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and line.count("|") == 6 and not line.startswith(("|---", "| figure"))
]


@cache
def results(file: str):
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[4]}")
def test_a_figure_is_the_number_in_its_file(row):
    figure, page, _, file, place = row
    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", (ROOT / page).read_text(encoding="utf-8")), page
    value = results(file.strip("`"))
    for name in place.split(" / "):
        value = value[int(name) if isinstance(value, list) else name]
    number = figure.removesuffix(" %")
    decimals = len(number.partition(".")[2])
    scale = 100 if figure.endswith("%") else 1
    assert f"{abs(value) * scale:.{decimals}f}" == number


def test_there_are_figures_of_every_kept_file():
    kept = {f"docs/results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.json")}
    named = {row[3].strip("`") for row in ROWS}
    # It is compared with its page by a test of its own.
    assert kept - named == {"docs/results/troubleshooting.json"}
