"""The house: which folder may import which, and what is too long, too wide, unused or written twice.

`python -m tests.test_house` prints the counts; `tests/helpers/house.py`, `config_fields.py` and `repeated_lines.py` count.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import house
from tests.helpers.config_fields import fields, unneeded_fields
from tests.helpers.house import PACKAGE, RECIPES, ROOT, room, sources, trees
from tests.helpers.repeated_lines import repeated_runs

TESTS = Path(__file__).parent
# What is counted, how, and the bound: a ratchet that falls with the count.
COUNTS: dict[str, tuple[Callable, int]] = {
    "imports that run up": (house.arrows_up, 0),
    "import circles": (house.circles, 0),
    "files over 300 lines, package": (lambda: house.long_files(PACKAGE), 0),
    "files over 300 lines, recipes": (lambda: house.long_files(RECIPES), 0),
    "functions over 60 lines, package": (lambda: house.long_functions(PACKAGE), 0),
    "functions over 60 lines, recipes": (lambda: house.long_functions(RECIPES), 1),
    "public functions with more than 8 parameters, package": (lambda: house.wide_functions(PACKAGE), 0),
    "public functions with more than 8 parameters, recipes": (lambda: house.wide_functions(RECIPES), 0),
    "arguments that public functions pop from their keywords": (lambda: house.popped_keywords(PACKAGE), 0),
    "classes that only cut another to pieces": (lambda: house.cut_classes(PACKAGE), 0),
    "configuration fields that no recipe, document or run needs": (unneeded_fields, 0),
    "runs of 6 or more lines that stand twice": (lambda: repeated_runs(sources(PACKAGE, RECIPES)), 0),
}


@pytest.mark.parametrize("title", COUNTS)
def test_what_the_house_counts_only_becomes_less(title):
    count, bound = COUNTS[title]
    found = count()
    assert len(found) <= bound, found


@pytest.mark.parametrize("module", [name for name in trees() if room(name) == "models"])
def test_what_travels_imports_only_what_travels(module):
    """transformers copies files named in `from .name import X`, and finds nothing else."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            assert "tokcom_hf" not in ast.unparse(node), ast.unparse(node)
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Try):
            inner = [item for item in ast.walk(node) if isinstance(item, ast.ImportFrom) and item.level]
            assert not inner, "an import inside try is not copied"


def test_every_file_that_travels_shows_its_family():
    """By its own prefix, or by transformers' own: configuration_, modeling_, pipeline_, processing_, image_processing_."""
    families = ("tokcom_", "vqgan_", "pruning_", "lfq_", "shared_")
    kinds = ("configuration_", "modeling_", "pipeline_", "processing_", "image_processing_")
    names = [name.partition(".")[2] for name in trees() if room(name) == "models"]
    assert [name for name in names if not name.startswith(families + kinds)] == []


def test_tests_import_helpers_and_never_each_other():
    """What test files share is in tests/helpers (those of the loopback hub: in tests/hub), and no file edits `sys.path`."""
    wrong = []
    for path in sources(TESTS):
        for node in ast.walk(house.parsed(path)):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path."):
                names = ["test_path"]
            if any(name.rpartition(".")[2].startswith("test_") for name in names):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_the_counts_see_what_they_count(tmp_path, monkeypatch):
    """A class cut in two, a popped keyword, a wide and long function and lines that stand twice are found."""
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr("tests.helpers.repeated_lines.ROOT", tmp_path)
    lines = "\n".join(f"    value_{number} = {number}" for number in range(70))
    wide = ", ".join(f"a{number}" for number in range(9))
    (tmp_path / "part.py").write_text("class Part:\n    pass\n")
    (tmp_path / "whole.py").write_text("from part import Part\n\n\nclass Whole(Part):\n    pass\n\n\nprint(Whole)\n")
    (tmp_path / "one.py").write_text(f"def one(self, {wide}, **more):\n    more.pop('hidden')\n{lines}\n")
    (tmp_path / "two.py").write_text(f"def two():\n    # none of the first function's\n{lines}\n")
    assert house.cut_classes(tmp_path) == ["part.Part: of Whole alone"]
    assert house.popped_keywords(tmp_path) == ["one.one: more.pop('hidden')"]
    assert house.wide_functions(tmp_path) == {"one.one": 9}
    assert set(house.long_functions(tmp_path)) == {"one.one", "two.two"}
    assert repeated_runs(sources(tmp_path)) == ["one.py:3 ~ two.py:3: 70 lines"]


def test_a_field_that_nobody_needs_is_found_and_one_that_a_recipe_sets_is_not(tmp_path, monkeypatch):
    assert {"TokComConfig.noise_std", "VQGANConfig.codebook_size", "LFQConfig.output_dim"} <= set(fields())
    path = tmp_path / "configuration_toy.py"
    path.write_text("class ToyConfig:\n    noise_std: float = 1.0\n    set_by_none: int = 0\n    model_type = 'toy'\n")
    monkeypatch.setattr("tests.helpers.config_fields.CONFIGURATIONS", [path])
    assert unneeded_fields() == ["ToyConfig.set_by_none"]


if __name__ == "__main__":
    for title, (count, bound) in COUNTS.items():
        found = count()
        print(f"{len(found):3d} {title} (bound {bound})")
        for item in found.items() if isinstance(found, dict) else found:
            print(f"      {item}")
