"""Documented names of options: what the four documents call an option, and which option of a recipe does that.

`parse_recipe(..., aliases=TRAIN_VQGAN)` accepts these names on the command line and in YAML files, and shows each in
`--help` beside its option. Unknown flags are answered from the same tables ("Did you mean"), so that a documented name given
to another recipe leads to the option that means the same there.

A name with dots is a path in a documented YAML file, for example `method_settings.merge_ratio`. Its last part is a flag too,
where no option and no other path of the recipe is called so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """The option `option` (`section.field`, or several of them) under a documented name.

    `convert` turns the documented value into the option's own: one value for one option, a tuple for several.
    It may raise ValueError with a sentence.
    """

    option: str | tuple[str, ...]
    convert: Callable[[Any], Any] | None = None


Aliases = dict[str, str | Alias]

TRAIN_TOKCOM: Aliases = {}

INFER_TOKCOM: Aliases = {}

TRAIN_VQGAN: Aliases = {}

ANALYZE_CODEBOOK: Aliases = {}

TRAIN_TOKEN_PRUNING: Aliases = {}

TRAIN_JOINT_LFQ: Aliases = {}

TABLES = (TRAIN_TOKCOM, INFER_TOKCOM, TRAIN_VQGAN, ANALYZE_CODEBOOK, TRAIN_TOKEN_PRUNING, TRAIN_JOINT_LFQ)


def options_of(alias: str | Alias) -> tuple[str, ...]:
    """The options, `section.field`, that an entry of a table stands for."""
    option = alias.option if isinstance(alias, Alias) else alias
    return (option,) if isinstance(option, str) else option


def meanings(name: str) -> list[str]:
    """Fields that the documented name `name` stands for in any recipe, in the order of the tables, without repeats."""
    found = [
        option.rpartition(".")[2]
        for table in TABLES
        for known, alias in table.items()
        if known.rpartition(".")[2] == name
        for option in options_of(alias)
    ]
    return list(dict.fromkeys(found))
