"""Fields that configurations no longer have: ignored at their former default, refused at any other value."""

from collections.abc import Mapping
from typing import Any


def take_removed(given: dict[str, Any], former: Mapping[str, Any], last_version: str = "0.2.0") -> list[str]:
    """Takes removed fields out of the keywords from which a configuration is built.

    Args:
        given: keywords of a caller or of a saved config.json; removed fields are taken out in place.
        former: removed field → its former default, which most saved folders hold, because they hold every field.
        last_version: the last version of tokcom_hf that reads these fields.

    Returns:
        Names of the removed fields that were given.

    Raises:
        ValueError: a removed field has another value than its former default.
    """
    found = {name: given.pop(name) for name in former if name in given}
    refuse_fields({name: value for name, value in found.items() if value != former[name]}, last_version)
    return list(found)


def refuse_fields(acting: Mapping[str, Any], last_version: str = "0.2.0") -> None:
    """Raises ValueError for removed fields, if there are any, whose values changed what a model computes or learns."""
    if acting:
        named = ", ".join(f"{name}={value!r}" for name, value in acting.items())
        raise ValueError(
            f"This configuration has {named}, which was removed; the last version of tokcom_hf that reads it is "
            f"{last_version}. Load the folder with that version, or leave the field out and train the model anew."
        )
