"""Images of a Hub data set as the bytes of their files, for this package's opener to read."""

from pathlib import Path
from typing import Any


def encoded_images(rows: Any, columns: tuple[str, ...] | None = None) -> Any:
    """A `datasets.Dataset` whose image columns are not decoded: `datasets` opens formats that start other programs.

    Args:
        columns: names of columns; all by default.
    """
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image) and (columns is None or name in columns):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def image_bytes(value: Any, place: str) -> Any:
    """A value of an image column: the bytes of a file, its path, or what it is (a PIL image, an array, None).

    Raises:
        ValueError: text; a data set of somebody else should not name files of this machine.
    """
    if isinstance(value, str):
        raise ValueError(f"{place}: the image is the text {value[:80]!r}; name a column that holds images.")
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])
    return value
