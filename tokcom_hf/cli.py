"""Recipe arguments: a YAML file of sections, overridden by the command line.

A recipe names its sections (for example `run`, `vae`, `vae_training`), each a dataclass. In the YAML file every section
is a mapping. On the command line, `--vae.hidden_size 256` sets one field of one section, and `--seed 3` sets that field
in every section that has it. Values are read as YAML, but `5e-4` is a number. A recipe may also accept documented names of
its options (`documented_names.py`).

A field may have the metadata `replaces`: a tuple of other fields of its section, or a function from the field's value to
such a tuple. Setting the field on the command line then unsets those fields where only the file has set them.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .cli_values import RecipeError, field_value, fields_of, read_yaml
from .data.text_files import read_text
from .documented_names import Alias, Aliases, options_of
from .endings import leave_together, run_recipe
from .suggestions import suggestion

__all__ = ["RecipeError", "leave_together", "parse_recipe", "read_yaml", "run_recipe"]


def parse_recipe(
    doc: str,
    sections: dict[str, type],
    default_config: str | Path | None = None,
    argv: Sequence[str] | None = None,
    aliases: Aliases | None = None,
) -> dict[str, dict[str, Any]]:
    """Reads `--config file.yaml` and command-line overrides into one dictionary per section.

    Args:
        doc: the recipe's docstring, printed by `--help`.
        sections: section name -> dataclass (a model config, a `TrainingArguments`, or the recipe's own).
        default_config: YAML file used when `--config` is not given.
        argv: arguments without the program name; `sys.argv[1:]` by default.
        aliases: documented names of the sections' fields, see `documented_names.py`.

    Returns:
        section name -> {field: value}, with only the fields that the file or the command line set.

    Raises:
        RecipeError: a section or flag is unknown (the message suggests the nearest one), the file is missing, or a value has
            the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(_help(doc, sections, aliases or {}))
        raise SystemExit(0)
    config_path, overrides = _split(argv, default_config)
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if config_path is not None:
        if not Path(config_path).is_file():
            raise RecipeError(f"Configuration file {str(config_path)!r} does not exist.")
        for path, value in _read_config(config_path, sections, aliases or {}):
            _set(values, sections, path, value, f"{config_path}: ", aliases)
    typed: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for flag, value in overrides:
        _set(typed, sections, flag, value, "--", aliases)
    for name, given in typed.items():
        for field in dataclasses.fields(sections[name]):
            if given.get(field.name) is not None:
                replaced = field.metadata.get("replaces", ())
                for other in replaced(given[field.name]) if callable(replaced) else replaced:
                    values[name].pop(other, None)
        values[name] |= given
    return values


def _read_config(file: str | Path, sections: dict[str, type], aliases: Aliases) -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) for each option that a configuration file sets."""
    try:
        loaded = read_yaml(read_text(file)) or {}
    except ValueError as error:
        raise RecipeError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise RecipeError(f"{file}: expected sections with options ({', '.join(sections)}), got one {kind}.")
    # Documented configuration files also have options outside of any section.
    known = {*aliases, *(field for cls in sections.values() for field in fields_of(cls) if aliases)}
    for section, mapping in loaded.items():
        if section in sections and not isinstance(mapping, dict | None):
            raise RecipeError(f"{file}: section {section!r} must hold options, name: value, got {mapping!r:.80}.")
        if section in sections:
            documented = [(f"{section}.{field}", value) for field, value in (mapping or {}).items()]
        else:
            documented = list(_leaves({section: mapping}, aliases))
            if not any(path in known for path, _ in documented):
                raise RecipeError(f"{file}: unknown section {section!r}; this recipe has {', '.join(sections)}.")
        yield from documented


def _leaves(tree: Any, aliases: Aliases, path: str = ""):
    """Yields (dotted path, value) for the leaves of nested sections; a mapping whose path is a documented name is a leaf."""
    if isinstance(tree, dict) and path not in aliases:
        for name, value in tree.items():
            yield from _leaves(value, aliases, f"{path}.{name}" if path else str(name))
    else:
        yield path, tree


def _split(argv: list[str], config: str | Path | None) -> tuple[str | Path | None, list[tuple[str, Any]]]:
    overrides: list[tuple[str, Any]] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        if token == "--traceback":  # read by `run_recipe`
            position += 1
            continue
        if not token.startswith("--"):
            raise RecipeError(f"Unexpected argument {token!r}; options look like --name value.")
        name, has_value, inline = token[2:].partition("=")
        value: str | list[str] = inline
        position += 1
        if not has_value:
            words = []
            while position < len(argv) and not argv[position].startswith("--"):
                words.append(argv[position])
                position += 1
            # A flag without a value means true; several values are a list, as with argparse's nargs="+".
            value = "true" if not words else words[0] if len(words) == 1 else words
        if name == "config":
            config = str(value)
        else:
            overrides.append((name, value))
    return config, overrides


def _set(values, sections, flag: str, value, origin: str, aliases: Aliases | None = None) -> None:
    section, dot, field = flag.partition(".")
    field = (field if dot else section).replace("-", "_")
    targets = [section] if dot else [name for name, cls in sections.items() if field in fields_of(cls)]
    targets = [name for name in targets if name in sections and field in fields_of(sections[name])]
    own = None if dot else _documented(field, aliases or {})
    # A documented name may equal a field's name: it then sets only the options of the table, not the field in all sections.
    meant = own is not None and any(option.rpartition(".")[2] == field for option in options_of(own))
    if targets and not meant:
        for name in targets:
            values[name][field] = field_value(
                value, fields_of(sections[name])[field], f"{origin}{flag}", origin == "--"
            )
        return
    alias = _documented(flag.replace("-", "_"), aliases or {})
    if alias is not None:
        _set_documented(values, sections, alias, value, origin, flag)
        return
    if dot and section not in sections:
        paths = difflib.get_close_matches(flag, list(aliases or {}), n=1)
        hint = f" Did you mean {paths[0]}?" if paths else ""
        raise RecipeError(f"{origin}{flag}: unknown section {section!r}; this recipe has {', '.join(sections)}.{hint}")
    known = [key for cls in sections.values() for key in fields_of(cls)]
    near = suggestion(field, sorted({*known, *(name.rpartition(".")[2] for name in aliases or {})}))
    hint = f" Did you mean {near}?" if near else " See --help."
    raise RecipeError(f"{origin}{flag[:80]}: no such option.{hint}")


def _documented(flag: str, aliases: Aliases) -> str | Alias | None:
    """Returns the table's entry of a documented name: its full path, or the last part of it if that is unambiguous."""
    if flag in aliases:
        return aliases[flag]
    ending = [alias for name, alias in aliases.items() if name.endswith(f".{flag}")]
    # The documents write some keys at two depths; both entries have the same option.
    return ending[0] if ending and all(alias == ending[0] for alias in ending) else None


def _set_documented(values, sections, alias: str | Alias, value, origin: str, flag: str) -> None:
    options, convert = options_of(alias), getattr(alias, "convert", None)
    if convert is None:
        results = [value] * len(options)
    else:
        try:
            if origin == "--":
                value = [read_yaml(word) for word in value] if isinstance(value, list) else read_yaml(value)
            result = convert(value)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{origin}{flag}: {error}") from None
        results = [result] if len(options) == 1 else list(result)
    for option, result in zip(options, results, strict=True):
        name, _, field = option.partition(".")
        typed = origin == "--" and convert is None
        values[name][field] = field_value(result, fields_of(sections[name])[field], f"{origin}{flag}", typed)


def _help(doc: str, sections: dict[str, type], aliases: Aliases) -> str:
    names: dict[str, list[str]] = {}
    for name, alias in aliases.items():
        for option in options_of(alias):
            names.setdefault(option, []).append(name if "." in name else f"--{name}")
    lines = [
        doc.strip(),
        "",
        "Options (--section.field value, or --field value for every section that has it; --traceback prints tracebacks):",
    ]
    for name, cls in sections.items():
        lines.append(f"\n[{name}] {cls.__name__}")
        for field in dataclasses.fields(cls):
            if not field.init or field.name.startswith("_"):
                continue
            text = " ".join(str(field.metadata.get("help", "")).split())
            default = "" if field.default is dataclasses.MISSING else f" (default {field.default!r})"
            also = f" (documented: {', '.join(names[key])})" if (key := f"{name}.{field.name}") in names else ""
            lines.append(f"  --{field.name}{default}{also}" + (f"  {text}" if text else ""))
    return "\n".join(lines)
