"""Values of recipe arguments: read as YAML, and checked against the fields of a dataclass."""

import dataclasses
import inspect
import re
import sys
import types
import typing
from typing import Any

import yaml


class RecipeError(ValueError):
    """A command line or configuration file that cannot be used; its message is meant for the user."""


class _Loader(yaml.SafeLoader):
    pass


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


def read_yaml(text: str) -> Any:
    """Parses YAML, reading `5e-4` as a float."""
    return yaml.load(text, Loader=_Loader)


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
        parsed = [read_yaml(word) for word in words]
        value = parsed if len(parsed) > 1 else parsed[0]
    if isinstance(value, str) and kinds <= {int, float, type(None)}:
        # The documents put numbers in quotation marks: lr: "2e-05".
        value = read_yaml(value)
    plain = {int, float, bool, str, type(None)}
    if not kinds <= plain or type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds and not isinstance(value, (list, dict)):
        return str(value)
    names = " or ".join(sorted("none" if kind is type(None) else kind.__name__ for kind in kinds))
    raise RecipeError(f"{where}: expected {names}, got {value!r}.")


def _is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
