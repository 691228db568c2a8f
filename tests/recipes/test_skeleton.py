"""Every training recipe has the same parts in the same order, and checks all arguments before it loads or builds a thing."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = (
    "train_tokcom", "train_vqgan", "train_token_pruning", "train_joint_lfq", "pretrain_vlm", "pretrain_internvl",
    "image_tokens", "train_ar_baseline",
)  # fmt: skip
PARTS = ("read_arguments", "build_data", "build_model", "build_trainer", "report")
# What a recipe needs before its training arguments are reached.
NEEDED = {"train_ar_baseline": ["--parameters", "1000", "--tokens", "1000"]}


def functions_of(name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def names_in(
    function: ast.FunctionDef, functions: dict[str, ast.FunctionDef], seen: tuple[str, ...] = ()
) -> list[str]:
    """Names that a function reads, in the order of its lines; behind one that is no part, what it reads."""
    read = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    found = []
    # Of a call in a call, the inner one runs first.
    for node in sorted(read, key=lambda node: (node.lineno, -node.col_offset)):
        found.append(node.id)
        if node.id in functions and node.id not in (*PARTS, *seen):
            found += names_in(functions[node.id], functions, (*seen, node.id))
    return found


@pytest.mark.parametrize("name", TRAINING)
def test_the_parts_stand_and_are_used_in_one_order(name):
    functions = functions_of(name)
    assert [part for part in functions if part in (*PARTS, "main")] == [*PARTS, "main"]
    used = names_in(functions["main"], functions)
    assert all(part in used for part in PARTS)
    places = [used.index(part) for part in PARTS]
    assert places == sorted(places), dict(zip(PARTS, places))
    assert all(ast.get_docstring(function) for function in functions.values()), "a function without docstring"


@pytest.mark.parametrize("name", TRAINING)
def test_the_docstring_says_what_it_makes_how_and_what_it_leaves(name):
    text = ast.get_docstring(ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8")))
    first, _, rest = text.partition("\n\n")
    assert first.endswith(".") and len(first.splitlines()) == 1
    commands = [line.split("#")[0].strip() for line in rest.partition("\n\n")[0].splitlines()]
    launcher = "python" if name == "train_ar_baseline" else "accelerate launch"
    assert commands[0].startswith(f"{launcher} recipes/{name}.py"), commands[0]
    assert "Leaves" in rest and "results.json" in rest.replace("budget.json", "results.json")


@pytest.mark.parametrize("name", TRAINING)
def test_arguments_of_every_stage_are_checked_before_anything_is_loaded_or_trained(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    spec = importlib.util.spec_from_file_location(f"skeleton_{name}", RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)
    spec.loader.exec_module(recipe)

    def too_early(*arguments, **options):
        raise AssertionError("built before all arguments were checked")

    for part in vars(recipe):
        if part.startswith("ensure_small") or part in PARTS[1:]:
            monkeypatch.setattr(recipe, part, too_early)
    sections = [name for name, cls in recipe.SECTIONS.items() if issubclass(cls, TrainingArguments)]
    assert sections
    for section in sections:
        wrong = [f"--{section}.lr_scheduler_type", "no_such_schedule", "--output_dir", str(tmp_path / "out")]
        with pytest.raises(ValueError, match="no_such_schedule"):
            recipe.main([*NEEDED.get(name, []), *wrong])
    assert not (tmp_path / "out").exists()
