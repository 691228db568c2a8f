"""Counts over the source: imports, and what is too long, too wide, or cut to pieces. Nothing is imported, only read."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, RECIPES = ROOT / "tokcom_hf", ROOT / "recipes"
# A folder imports those below it only. Beside them: cli.py and others at the top, which any of them may import.
ROOMS = ("small_models", "trainers", "evaluation", "plots", "metrics", "data", "models")
LEAVES = frozenset(("metrics", "data", "models"))
# Image files and tokenizer sizes are read in the same way by data sets and by what travels to the Hub.
SHARED = frozenset(("models.shared_image_files", "models.shared_tokenizer_size"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def sources(*folders: Path) -> tuple[Path, ...]:
    return tuple(path for folder in folders for path in sorted(folder.rglob("*.py")))


def module_of(path: Path) -> str:
    """`models.vqgan_network` for a file of the package, `recipes.train_vqgan` for a recipe."""
    name = ".".join(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else ""


@cache
def trees() -> dict[str, ast.Module]:
    """Module of the package → its syntax tree."""
    return {module_of(path): parsed(path) for path in sources(PACKAGE)}


def room(module: str) -> str | None:
    return module.split(".")[0] if "." in module else None


def imports(module: str) -> Iterator[str]:
    """Modules of the package that `module` imports anywhere, functions included; without `tokcom_hf.`."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = module.split(".")[: -node.level] if "." in module else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = (node.module or "").partition(".")[2]
            else:
                continue
            inner = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            yield from [name for name in inner if name in trees()] or ([base] if base in trees() else [])


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


def long_files(folder: Path, limit: int = 300) -> dict[str, int]:
    lengths = {module_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)}
    return {name: length for name, length in lengths.items() if length > limit}


def functions(folder: Path) -> Iterator[tuple[str, Function]]:
    for path in sources(folder):
        for node in ast.walk(parsed(path)):
            if isinstance(node, Function):
                yield f"{module_of(path)}.{node.name}", node


def length_of(node: Function) -> int:
    """Lines without docstring."""
    text = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def long_functions(folder: Path, limit: int = 60) -> dict[str, int]:
    return {name: length for name, node in functions(folder) if (length := length_of(node)) > limit}


def parameters(node: Function) -> list[str]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def wide_functions(folder: Path, limit: int = 8) -> dict[str, int]:
    """Public functions with more parameters than `limit`; `forward` and `generate` name every argument of a model."""
    found = {}
    for name, node in functions(folder):
        function, count = name.rpartition(".")[2], len(parameters(node))
        if not function.startswith("_") and function not in ("forward", "generate") and count > limit:
            found[name] = count
    return found


def popped_keywords(folder: Path) -> list[str]:
    """Public functions that take arguments out of their `**kwargs` by name, where no signature shows them."""
    found = []
    for name, node in functions(folder):
        if name.rpartition(".")[2].startswith("_") or node.args.kwarg is None:
            continue
        pops = f"{node.args.kwarg.arg}.pop"
        found += [
            f"{name}: {ast.unparse(call)}" for call in ast.walk(node)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == pops
        ]  # fmt: skip
    return found


def cut_classes(folder: Path) -> list[str]:
    """Classes that only cut another one to pieces: alone in a file, without a base, inherited by one class, used by none.

    A base class that several inherit, and one that code makes or names, is a class of its own.
    """
    classes: dict[str, tuple[Path, ast.ClassDef]] = {}
    heirs: dict[str, set[str]] = {}
    for path in sources(folder):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = (path, node)
                for base in node.bases:
                    heirs.setdefault(ast.unparse(base).split("[")[0].rpartition(".")[2], set()).add(node.name)
    named: dict[str, int] = {}
    for path in sources(folder):
        bases = {
            id(n) for c in ast.walk(parsed(path)) if isinstance(c, ast.ClassDef) for b in c.bases for n in ast.walk(b)
        }
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Name) and id(node) not in bases:
                named[node.id] = named.get(node.id, 0) + 1
    found = []
    for name, (path, node) in classes.items():
        alone = sum(other == path for other, _ in classes.values()) == 1
        if alone and len(heirs.get(name, ())) == 1 and not named.get(name):
            foreign = [base for base in map(ast.unparse, node.bases) if base not in ("ABC", "Protocol", "object")]
            if not foreign:
                found.append(f"{module_of(path)}.{name}: of {heirs[name].pop()} alone")
    return found
