"""docs/troubleshooting.md: every advice of the documents has a paragraph, options that exist, and measured figures."""

import json
import re
import runpy
from pathlib import Path

import pytest

from tokcom_hf.cli import parse_recipe
from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING, TRAIN_VQGAN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results" / "troubleshooting.json"
BENCHMARKS = ROOT / "recipes" / "benchmarks"
# Section of the page: recipe whose options it names, and those options' documented names.
RECIPES = {
    "VQGAN": ("train_vqgan", TRAIN_VQGAN),
    "Token pruning": ("train_token_pruning", TRAIN_TOKEN_PRUNING),
}
# Problem of a document: how many remedies it names.
PROBLEMS = {
    "The codebook still collapses": 5,
    "Memory runs out": 3,
    "The number of tokens does not fall": 3,
    "Accuracy falls too far": 3,
    "The discriminator is too strong": 3,
    "The temperature does not change": 1,
    "The vocabulary's size does not match": 2,
    "The embeddings' shape is wrong": 2,
    "Codes do not come back from their ids": 2,
}


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(BENCHMARKS / "troubleshooting.py"), run_name="recipe")


def section(heading: str, level: int) -> str:
    """The text below a heading, up to the next one of its level or above."""
    found = re.search(rf"^{'#' * level} {re.escape(heading)}$(.*?)(?=^#{{1,{level}}} |\Z)", PAGE, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found.group(1)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_advice_has_a_paragraph_with_a_figure(problem):
    advice = re.findall(r"^\d\. (.*?)(?=^\d\. |^\S|\Z)", section(problem, 3), re.M | re.S)
    assert len(advice) == PROBLEMS[problem]
    for paragraph in advice:
        assert "`" in paragraph, "what to type"
        assert re.search(r"\d", re.sub(r"`[^`]*`", "", paragraph)), f"a figure: {paragraph}"


@pytest.mark.parametrize("heading", RECIPES)
def test_every_option_named_exists_in_the_recipe(heading):
    recipe, aliases = RECIPES[heading]
    sections = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="recipe")["SECTIONS"]
    options = re.findall(r"`(--[^`]+)`", section(heading, 2))
    assert len(options) >= 5
    for option in options:
        values = parse_recipe("Doc.", sections, None, option.split(), aliases)
        assert any(values.values()), f"{option} sets nothing"


@pytest.mark.parametrize("name", ["vqgan", "pruning", "memory", "lfq"])
def test_the_tables_are_those_of_the_measured_run(name, benchmark, tmp_path):
    arguments = benchmark["SmallRunArguments"](output_dir=str(tmp_path), output=str(RESULTS))
    runs = benchmark["SmallRuns"](arguments, list(benchmark["SECTIONS"]))
    before = json.dumps(runs.results)
    # Every row is in the file: nothing is trained here.
    runs.train = None
    assert benchmark["SECTIONS"][name](runs) in PAGE
    assert json.dumps(runs.results) == before


def test_figures_in_the_text_stand_in_a_table():
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    text = re.sub(r"```.*?```|`[^`]*`|LLaVA-1.5", "", text, flags=re.S)
    figures = re.findall(r"\d+\.\d+", text)
    assert len(figures) >= 20
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]|\d)", tables)]
