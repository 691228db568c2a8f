"""Reads images of a Hub data set as encoded bytes, so that `models/shared_image_files.py` decodes them."""

from pathlib import Path
from typing import Any


def encoded_images(rows: Any, columns: tuple[str, ...] | None = None) -> Any:
    """Turns off decoding of image columns, because `datasets` also opens formats whose decoders start other programs.

    Args:
        rows: a `datasets.Dataset`.
        columns: names of the columns; all image columns by default.

    Returns:
        the data set, whose image columns hold encoded files.
    """
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image) and (columns is None or name in columns):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def image_bytes(value: Any, place: str) -> Any:
    """Returns the image in a value of an image column: file bytes, a path, or the value itself (PIL image, array, None).

    Raises:
        ValueError: the value is text; a downloaded data set must not name files of this machine.
    """
    if isinstance(value, str):
        raise ValueError(f"{place}: the image is the text {value[:80]!r}; name a column that holds images.")
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])
    return value
