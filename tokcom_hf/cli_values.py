"""Values of recipe arguments: read as YAML, and checked against the fields of a dataclass."""

import contextlib
import dataclasses
import inspect
import math
import re
import sys
import types
import typing
from typing import Any

import yaml

PLAIN = {int, float, bool, str, type(None)}
LARGEST = 10**300  # of an integer that is read as a float
# A configuration has a few hundred; a document of aliases can stand for billions.
MOST_VALUES = 100_000


class RecipeError(ValueError):
    """A command line or configuration file that cannot be used; its message is meant for the user."""


class _Loader(yaml.SafeLoader):
    """Plain values only, from a document of bounded size, with no key twice in a mapping."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return self.construct_document(node)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """Values that a node stands for, those of each alias counted again; a few lines of aliases may be billions."""
    if node in counts:
        known = counts[node]
        if known is None:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands inside its own value", node.start_mark
            )
        return known
    counts[node] = None
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    total = 1 + sum(_count(part, counts) for part in inner)
    if total > MOST_VALUES:
        text = f"more than {MOST_VALUES:,} values, those of aliases counted again"
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
    counts[node] = total
    return total


# PyYAML follows YAML 1.1, where 5e-4 is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


# Nor is `no` a boolean to anybody who writes `--eval_strategy no`.
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
# Nor is 010 eight, or 1:30 ninety.
_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Parses one YAML document of plain values, reading `5e-4` as a float.

    Raises:
        ValueError: no YAML, a tag that stands for an object of Python, a key twice in a mapping, or more values than
            `MOST_VALUES`; one sentence with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}no YAML that can be read ({' '.join(str(error.problem).split())[:160]}).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML that can be read ({' '.join(str(error).split())[:160]}).") from None
    except RecursionError:
        raise ValueError("no YAML that can be read (nested too deeply).") from None
    except (ValueError, OverflowError) as error:  # digits that make no number
        raise ValueError(f"no YAML that can be read ({' '.join(str(error).split())[:160]}).") from None


def fields_of(cls: type) -> dict[str, Any]:
    return {field.name: _annotation(cls, field) for field in dataclasses.fields(cls) if field.init}


def _annotation(cls: type, field: dataclasses.Field) -> Any:
    """The field's type; Any where its annotation names something that only type checkers import."""
    if not isinstance(field.type, str):
        return field.type
    owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
    try:
        return eval(field.type, vars(sys.modules[owner.__module__]))
    except (NameError, AttributeError, TypeError):
        return Any


def field_value(value, annotation, where: str, from_command_line: bool):
    """Checks plain scalar annotations; anything richer is left to the dataclass itself."""
    kinds = set(typing.get_args(annotation)) if _is_union(annotation) else {annotation}
    if from_command_line:
        words = value if isinstance(value, list) else [value]
        # Beside other types a string may mean something else: --report_to none.
        optional = type(None) in kinds and (str not in kinds or kinds <= {str, type(None)})
        if optional and words in (["none"], ["null"]):
            return None
        if kinds <= {str, type(None)} and len(words) == 1:
            return words[0]
        try:
            parsed = [read_yaml(word) for word in words]
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from None
        value = parsed if len(parsed) > 1 else parsed[0]
    if isinstance(value, str) and kinds <= {int, float, type(None)}:
        # The documents put numbers in quotation marks: lr: "2e-05".
        with contextlib.suppress(ValueError):  # then it is no number, which is said below
            value = read_yaml(value)
    _check_lists(value, kinds, where)
    if not kinds <= PLAIN or type(value) in kinds:
        return _finite(value, where)
    if float in kinds and type(value) is int:
        return _finite(float(value) if abs(value) < LARGEST else float("inf"), where)
    if str in kinds and not isinstance(value, (list, dict, bytes, set)):
        return str(value)
    names = " or ".join(sorted("none" if kind is type(None) else kind.__name__ for kind in kinds))
    raise RecipeError(f"{where}: expected {names}, got {value!r:.200}.")


def _check_lists(value, kinds: set, where: str) -> None:
    """Raises RecipeError where a list of plain values is wanted and a text, a mapping or another list is given."""
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if len(lists) != 1 or not kinds - set(lists) <= PLAIN or not set(typing.get_args(lists[0])) <= PLAIN:
        return
    # One value stands for a list of one, or for what else the field may be.
    wanted = set(typing.get_args(lists[0])) | (set() if isinstance(value, list) else kinds - set(lists))
    for part in value if isinstance(value, list) else [value]:
        number = float in wanted and type(part) is int
        if type(part) not in wanted and not number and not (part is None and value is None):
            names = " or ".join(sorted(kind.__name__ for kind in typing.get_args(lists[0])))
            raise RecipeError(f"{where}: expected a list of {names}, got {value!r:.200}.")
        _finite(part, where)


def _finite(value, where: str):
    """`value`; raises RecipeError where it is NaN or infinite, which no option means."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value!r}.")
    return value


def _is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
