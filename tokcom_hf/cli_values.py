"""Values of recipe arguments: reads them as YAML and checks them against the fields of a dataclass."""

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
LARGEST = 10**300  # an integer of at least this size is infinite as a float
# A configuration has a few hundred values; a few lines of nested YAML aliases can expand to billions.
MOST_VALUES = 100_000


class RecipeError(ValueError):
    """A command line or configuration file is invalid; the message is written for the user."""


class _Loader(yaml.SafeLoader):
    """Loads plain values only, and refuses documents of more than `MOST_VALUES` values and duplicate keys in a mapping."""

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
    """Counts the values that a node expands to; each use of an alias counts all its values again."""
    if node in counts:
        known = counts[node]
        if known is None:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias occurs inside its own value", node.start_mark
            )
        return known
    counts[node] = None
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    total = 1 + sum(_count(part, counts) for part in inner)
    if total > MOST_VALUES:
        text = f"more than {MOST_VALUES:,} values after expanding aliases"
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
    counts[node] = total
    return total


# PyYAML follows YAML 1.1, where 5e-4 is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


# YAML 1.1 also reads `no` as a boolean, but `--eval_strategy no` means the string.
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
# YAML 1.1 also reads 010 as 8 and 1:30 as 90; here both stay strings.
_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Parses one YAML document of plain values, reading `5e-4` as a float.

    Raises:
        ValueError: the text is no YAML, has a tag of a Python object or a duplicate key, or expands to more than
            `MOST_VALUES` values. The message is one sentence that names the line where it is known.
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
    except (ValueError, OverflowError) as error:  # digits that form no valid number or date
        raise ValueError(f"no YAML that can be read ({' '.join(str(error).split())[:160]}).") from None


def fields_of(cls: type) -> dict[str, Any]:
    return {field.name: _annotation(cls, field) for field in dataclasses.fields(cls) if field.init}


def _annotation(cls: type, field: dataclasses.Field) -> Any:
    """Returns the field's type, or Any if its annotation uses a name that is imported for type checking only."""
    if not isinstance(field.type, str):
        return field.type
    owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
    try:
        return eval(field.type, vars(sys.modules[owner.__module__]))
    except (NameError, AttributeError, TypeError):
        return Any


def field_value(value, annotation, where: str, from_command_line: bool):
    """Converts `value` to a field's annotated scalar or list type and checks it; other types are left to the dataclass.

    Raises:
        RecipeError: the value has the wrong type, or is NaN or infinite; the message begins with `where`.
    """
    kinds = set(typing.get_args(annotation)) if _is_union(annotation) else {annotation}
    if from_command_line:
        words = value if isinstance(value, list) else [value]
        # Where a string is allowed among other types, "none" is a value: --report_to none.
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
        with contextlib.suppress(ValueError):  # not a number: the type check below raises
            value = read_yaml(value)
    value = _as_list(value, kinds, where)
    if not kinds <= PLAIN or type(value) in kinds:
        return _finite(value, where)
    if float in kinds and type(value) is int:
        return _finite(float(value) if abs(value) < LARGEST else float("inf"), where)
    if str in kinds and not isinstance(value, (list, dict, bytes, set)):
        return str(value)
    names = " or ".join(sorted("none" if kind is type(None) else kind.__name__ for kind in kinds))
    raise RecipeError(f"{where}: expected {names}, got {value!r:.200}.")


def _as_list(value, kinds: set, where: str) -> Any:
    """Returns the value of a field that is a list of plain values: a single value becomes a list of one item.

    Raises:
        RecipeError: `value`, or an item of it, has another type.
    """
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if len(lists) != 1 or not kinds - set(lists) <= PLAIN or not set(typing.get_args(lists[0])) <= PLAIN:
        return value
    # A single value is an item, or a value of the field's other types.
    wanted = set(typing.get_args(lists[0])) | (set() if isinstance(value, list) else kinds - set(lists))
    for part in value if isinstance(value, list) else [value]:
        number = float in wanted and type(part) is int
        if type(part) not in wanted and not number and not (part is None and value is None):
            names = " or ".join(sorted(kind.__name__ for kind in typing.get_args(lists[0])))
            raise RecipeError(f"{where}: expected a list of {names}, got {value!r:.200}.")
        _finite(part, where)
    alone = not isinstance(value, list) and value is not None and kinds - set(lists) <= {type(None)}
    return [value] if alone else value


def _finite(value, where: str):
    """Returns `value`; raises RecipeError if it is NaN or infinite, because no option accepts these."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value!r}.")
    return value


def _is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
