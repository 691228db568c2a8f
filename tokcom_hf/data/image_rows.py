"""Rows of JSON lines that name an image and texts about it: the fields, where images may lie, and whether they are whole."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..models.shared_image_files import check_image

# No system opens a longer one.
LONGEST_PATH = 4096
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


@dataclass
class ImageTextRow:
    """One line of a file; every error names it.

    Args:
        place: file and line.
        record: its JSON object.
        expected: what such a line holds, for errors.
    """

    place: str
    record: dict[str, Any]
    expected: str

    def text(self, key: str, default: str | None = None) -> str:
        """The text of a field; `default` where it is missing or null.

        Raises:
            ValueError: no such field and no default, or something that is no text.
        """
        value = self.record.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str, default: str | None = None) -> list[str]:
        """The text or number of a field, or its list of them; `default` where it is missing or null.

        Raises:
            ValueError: no such field and no default, an empty list, or something that is neither text nor number.
        """
        value = self.record.get(key)
        value = default if value is None else value
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
            raise self._wrong(key, "a text or a list of texts")
        return [str(v) for v in values]

    def image(self, folder: Path, allow_outside: bool) -> Path | None:
        """The path of the field `image`; None where it is missing or null.

        Args:
            folder: what the path is relative to. Symbolic links in it are followed, whoever made the folder made them;
                `..` is taken out of the path before.
            allow_outside: take absolute paths and those that leave the folder through `..`, too.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a URL, no path, or a path outside the folder.
        """
        name = self.record.get("image")
        if name is None:
            return None
        if not isinstance(name, str) or not name.strip():
            raise self._wrong("image", "a path")
        if URL.match(name):
            raise ValueError(f"{self.place}: image {name[:80]!r} is a URL; download it and give its path.")
        inside = os.path.normpath(name)
        absolute = os.path.isabs(name) or bool(os.path.splitdrive(name)[0])
        if not allow_outside and (absolute or inside.split(os.sep)[0] == os.pardir):
            reason = "is an absolute path" if absolute else f"lies outside {str(folder)!r}"
            raise ValueError(
                f"{self.place}: image {name!r} {reason}; a downloaded file could name any image of this machine that way. "
                f"Name images inside {str(folder)!r} (links are fine), or allow it with allow_outside=True "
                "(--allow_outside true)."
            )
        if len(name) > LONGEST_PATH:
            raise ValueError(f"{self.place}: image {name[:40]!r}… is no path: it has {len(name):,} characters.")
        path = folder / (name if allow_outside else inside)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{self.place}: image {str(path)!r} does not exist.")
        return path

    def _wrong(self, key: str, wanted: str) -> ValueError:
        got = f"is {self.record[key]!r:.80}, not {wanted}" if key in self.record else "is missing"
        return ValueError(f"{self.place}: expected JSON with {self.expected}, but {key!r} {got}.")


def image_folder(file: str | Path, image_dir: str | Path | None) -> Path:
    """What image paths in `file` are relative to: `image_dir`, or the file's own folder.

    Raises:
        NotADirectoryError: `image_dir` is no folder.
    """
    if image_dir is None:
        return Path(file).parent
    if not Path(image_dir).is_dir():
        raise NotADirectoryError(f"Image folder {str(image_dir)!r} does not exist or is not a folder.")
    return Path(image_dir)


def check_images(images: Iterable[tuple[str, Any]], number: int | None = None) -> None:
    """Finds broken images before a training meets them, without decoding whole ones (`shared_image_files.check_image`).

    Args:
        images: (where it is named, path or binary file object) of each; a path that was seen is not checked again.
        number: of images, for the progress bar.

    Raises:
        ValueError: images that cannot be read, the first five named.
    """
    seen, broken = set(), []
    for place, image in tqdm(images, "checking images", number, delay=2, leave=False):
        if isinstance(image, Path):
            if image in seen:
                continue
            seen.add(image)
        try:
            check_image(image)
        except ValueError as error:
            broken.append(f"{place}: {error}")
    if broken:
        more = f" And {len(broken) - 5} more." if len(broken) > 5 else ""
        raise ValueError(f"{len(broken)} image(s) cannot be read. {'; '.join(broken[:5])}.{more}")
