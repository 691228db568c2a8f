"""Which fields of the models' configurations somebody needs.

A field is an annotated name in the body of a `*Config` class of models/configuration_*.py, or an argument of its
`__init__`. It is needed where

- a recipe sets it: a key of a YAML file or, in a recipe's code, a keyword, a key of a dict or an option `--section.field`;
- docs/documents.md names it between backquotes, in what a document says or in what to type;
- the package writes it from what it measured or loaded: `config.field = ...`, a keyword of a `*Config(...)` call, or a key
  of a dict that a function builds.

Fields are matched by name, whatever the class: a name that two configurations share counts for both.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache

import yaml

from .house import PACKAGE, RECIPES, ROOT, parsed, sources

CONFIGURATIONS = sorted((PACKAGE / "models").glob("configuration_*.py"))


def fields() -> Iterator[str]:
    """`Class.field`, as written; what a configuration inherits from transformers is not ours."""
    for path in CONFIGURATIONS:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and not ast.unparse(part.annotation).startswith("ClassVar"):
                        yield f"{node.name}.{ast.unparse(part.target)}"
                    elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        arguments = (*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs)
                        yield from (f"{node.name}.{a.arg}" for a in arguments if a.arg != "self")


def keys(value) -> Iterator[str]:
    """Keys of a YAML file, at any depth; the last part of `section.field`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key).rpartition(".")[2]
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def constant_keys(node: ast.Dict) -> list[str]:
    return [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def set_by_code(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Dict):
            yield from constant_keys(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"--(?:\w+\.)?(\w+)", node.value)


@cache
def set_by_recipes() -> frozenset[str]:
    found = {key for path in RECIPES.rglob("*.yaml") for key in keys(yaml.safe_load(path.read_text(encoding="utf-8")))}
    for path in sources(RECIPES):
        found |= set(set_by_code(parsed(path)))
    return frozenset(found)


@cache
def named_by_documents() -> frozenset[str]:
    """Words between backquotes, in the columns of what a document says and of what to type."""
    found: set[str] = set()
    for line in (ROOT / "docs" / "documents.md").read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        for cell in cells[1:2] + cells[3:4]:
            for code in re.findall(r"`([^`]+)`", cell):
                found |= set(re.findall(r"\w+", code))
    return frozenset(found)


@cache
def written_by_package() -> frozenset[str]:
    found: set[str] = set()
    for path in sources(PACKAGE):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Assign) and path not in CONFIGURATIONS:
                attributes = [target for target in node.targets if isinstance(target, ast.Attribute)]
                found |= {target.attr for target in attributes if ast.unparse(target.value).endswith("config")}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Config"):
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif isinstance(node, ast.FunctionDef):
                # Tables at the top of a file, which list fields without setting them, are passed over.
                inner = (one for part in node.body for one in ast.walk(part) if isinstance(one, ast.Dict))
                found |= {key for one in inner for key in constant_keys(one)}
    return frozenset(found)


def unneeded_fields() -> list[str]:
    needed = set_by_recipes() | named_by_documents() | written_by_package()
    return [field for field in fields() if field.partition(".")[2] not in needed]
