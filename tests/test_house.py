"""The house: which folder may import which, no circles, and files and functions that fit a screen.

`python tests/test_house.py` prints the counts.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokcom_hf"
# A folder imports those below it only. Beside them: cli.py and others at the top, which any of them may import.
ROOMS = ("small_models", "trainers", "evaluation", "plots", "metrics", "data", "models")
LEAVES = frozenset(("metrics", "data", "models"))
# Image files and tokenizer sizes are read in the same way by data sets and by what travels to the Hub.
SHARED = frozenset(("models.shared_image_files", "models.shared_tokenizer_size"))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else ""


@cache
def trees() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Modules of the package that `module` imports anywhere, functions included; without `tokcom_hf.`."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = module.split(".")[: -node.level] if "." in module else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = node.module.partition(".")[2]
            else:
                continue
            inner = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            yield from [name for name in inner if name in trees()] or ([base] if base in trees() else [])


def room(module: str) -> str | None:
    return module.split(".")[0] if "." in module else None


def arrows_up() -> list[str]:
    found = []
    for module in trees():
        for target in imports(module):
            here, there = room(module), room(target)
            if here is None or there is None or here == there or (here == "data" and target in SHARED):
                continue
            if ROOMS.index(there) < ROOMS.index(here) or here in LEAVES:
                found.append(f"{module} -> {target}")
    return found


def circles() -> list[set[str]]:
    """Sets of modules that reach each other (Tarjan's strongly connected components)."""
    graph = {module: sorted(set(imports(module))) for module in trees()}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == order[module]:
            members = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(members) > 1:
                found.append(members)

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_imports_run_downward_and_never_in_circles():
    assert arrows_up() == []
    assert circles() == []


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


def long_files(limit: int = 300) -> dict[str, int]:
    lengths = {module_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    return {name: length for name, length in lengths.items() if length > limit}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def long_functions(limit: int = 60) -> dict[str, int]:
    """Lines without docstring."""
    found = {}
    for name, node in functions():
        text = node.body[0] if ast.get_docstring(node) else None
        length = node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)
        if length > limit:
            found[name] = length
    return found


def wide_functions(limit: int = 8) -> dict[str, int]:
    """Public functions with more parameters than `limit`; `forward`, `generate` and `__call__` name every argument."""
    found = {}
    for name, node in functions():
        function = name.rpartition(".")[2]
        count = len([a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"])
        if not function.startswith("_") and function not in ("forward", "generate") and count > limit:
            found[name] = count
    return found


def test_what_is_too_long_or_too_wide_only_becomes_less():
    """The house wants at most 3 files, 5 functions and no wide one; the numbers here are what is left."""
    assert len(long_files()) <= 14
    assert len(long_functions()) <= 5
    assert len(wide_functions()) <= 5


if __name__ == "__main__":
    for title, found in (
        ("imports that run up", arrows_up()),
        ("circles", circles()),
        ("files over 300 lines", long_files()),
        ("functions over 60 lines", long_functions()),
        ("public functions with more than 8 parameters", wide_functions()),
    ):
        print(f"{len(found):3d} {title}")
        for item in found.items() if isinstance(found, dict) else found:
            print(f"      {item}")
