"""What holds for every recipe: help on any terminal, flags that errors advise, one way to resume."""

import ast
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

from tokcom_hf.cli import run_recipe
from tokcom_hf.cli_values import fields_of
from tokcom_hf.run_folders import RunFolderArguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path for path in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "benchmarks").glob("*.py")]
    if path.name != "__init__.py"
)  # fmt: skip
TRAINING = (
    "train_tokcom", "train_vqgan", "train_token_pruning", "train_joint_lfq", "pretrain_vlm", "pretrain_internvl",
    "image_tokens", "train_ar_baseline",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipes():
    """Path -> module, each loaded once."""
    modules = {}
    for path in RECIPES:
        name = f"any_recipe_{path.parent.name}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        modules[path] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[path])
    # A benchmark's model is a file of its own, and no recipe.
    yield {path: module for path, module in modules.items() if hasattr(module, "main")}
    for path in RECIPES:
        del sys.modules[f"any_recipe_{path.parent.name}_{path.stem}"]


@pytest.fixture(scope="module")
def sections(recipes):
    """Path -> the sections that the recipe asks `parse_recipe` for."""
    found = {}

    class Asked(Exception):
        pass

    def spy(doc, wanted, *args, **kwargs):
        found[path] = wanted
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        for path, module in recipes.items():
            patch.setattr(module, "parse_recipe", spy)
            patch.setattr(sys, "argv", [path.name, "--help"])
            with pytest.raises(Asked):
                module.main()
    return found


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_is_printed_on_terminals_that_know_few_characters(recipes, monkeypatch, encoding):
    for path, module in recipes.items():
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit) as end:
            run_recipe(module.main)
        monkeypatch.undo()
        terminal.flush()
        assert end.value.code == 0, path
        assert "Options (--section.field value" in terminal.buffer.getvalue().decode(encoding), path


def advised_flags(path: Path) -> set[str]:
    """Flags in the texts of a file's `raise` statements."""
    raised = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise)]
    texts = [
        part.value for node in raised for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]  # fmt: skip
    return {flag for text in texts for flag in re.findall(r"--([a-z][a-z0-9_]*[a-z0-9](?:\.[a-z0-9_]+)?)", text)}


def flags_of(wanted: dict[str, type]) -> set[str]:
    names = {(section, name) for section, cls in wanted.items() for name in fields_of(cls)}
    return (
        {name for _, name in names}
        | {f"{section}.{name}" for section, name in names}
        | {"config", "help", "traceback"}
    )


def test_every_flag_that_a_recipes_error_advises_exists_in_it(sections):
    wrong = {path.name: advised_flags(path) - flags_of(wanted) for path, wanted in sections.items()}
    # These two advise the flag of another recipe, which they name.
    wrong["evaluate_tokcom.py"] -= {"output_dir"}
    assert {name: flags for name, flags in wrong.items() if flags} == {}


def test_every_flag_that_a_trainers_error_advises_exists_in_all_training_recipes(sections):
    package = ROOT / "tokcom_hf"
    folders = [package / name for name in ("run_folders.py", "output_folders.py", "run_marker.py")]
    files = [*folders, package / "checkpoints.py", package / "hub.py", *(package / "trainers").glob("base*.py")]
    advised = set().union(*map(advised_flags, files))
    # The advice of a full folder is a constant.
    advised |= {flag for file in folders for flag in re.findall(r"--([a-z_]+)", file.read_text(encoding="utf-8"))}
    assert {"resume_from_checkpoint", "overwrite", "output_dir", "hub_model_id", "eval_strategy"} <= advised
    for path, wanted in sections.items():
        if path.stem in TRAINING:
            assert advised - flags_of(wanted) == set(), path


def test_errors_of_the_package_advise_flags_that_some_recipe_has(sections):
    known = set().union(*(flags_of(wanted) for wanted in sections.values()))
    wrong = {
        path.name: flags - known
        for path in (ROOT / "tokcom_hf").rglob("*.py")
        # "--name value" is the command line's own grammar, and --num_processes is accelerate's.
        if (flags := advised_flags(path)) - known - {"name", "num_processes"}
    }
    assert wrong == {}


def test_every_training_recipe_resumes_by_the_same_arguments(sections):
    found = {path.stem: wanted["run"] for path, wanted in sections.items() if path.stem in TRAINING}
    assert set(found) == set(TRAINING)
    assert all(issubclass(cls, RunFolderArguments) for cls in found.values())
    defaults = [cls().output_dir for cls in found.values()]
    assert len(set(defaults)) == len(TRAINING) and all(path.startswith("outputs/") for path in defaults)
