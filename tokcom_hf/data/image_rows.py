"""JSON lines that name an image and texts about it: reads their fields and checks image paths and image files."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..models.shared_image_files import check_image

# Characters; no common file system opens a longer path.
LONGEST_PATH = 4096
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


@dataclass
class ImageTextRow:
    """One JSON line of a file; every error message names the file and the line.

    Args:
        place: file and line, for error messages.
        record: the line's JSON object.
        expected: the fields such a line needs, for error messages.
    """

    place: str
    record: dict[str, Any]
    expected: str

    def text(self, key: str, default: str | None = None) -> str:
        """Returns the text of a field; `default` where the field is missing or null.

        Raises:
            ValueError: the field is missing and has no default, or its value is no text.
        """
        value = self.record.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str, default: str | None = None) -> list[str]:
        """Returns a field's text or number, or its list of them, as a list of texts; `default` where it is missing or null.

        Raises:
            ValueError: the field is missing and has no default, is an empty list, or holds neither text nor number.
        """
        value = self.record.get(key)
        value = default if value is None else value
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
            raise self._wrong(key, "a text or a list of texts")
        return [str(v) for v in values]

    def image(self, folder: Path, allow_outside: bool) -> Path | None:
        """Returns the path in the field `image`; None where it is missing or null.

        Args:
            folder: the folder that the path is relative to. `..` is resolved in the path's text first. Symbolic links
                inside the folder are followed, because the folder's owner made them.
            allow_outside: also accept absolute paths and paths that leave the folder through `..`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the field holds a URL, no path, or a path outside the folder.
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
                f"{self.place}: image {name!r} {reason}; a downloaded file could read any image of this machine that way. "
                f"Name images inside {str(folder)!r} (symbolic links are allowed), or allow this with allow_outside=True "
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
    """Returns the folder that image paths in `file` are relative to: `image_dir`, or the file's own folder.

    Raises:
        NotADirectoryError: `image_dir` is no folder.
    """
    if image_dir is None:
        return Path(file).parent
    if not Path(image_dir).is_dir():
        raise NotADirectoryError(f"Image folder {str(image_dir)!r} does not exist or is not a folder.")
    return Path(image_dir)


def check_images(images: Iterable[tuple[str, Any]], number: int | None = None) -> None:
    """Finds broken images before training starts, without decoding intact ones (`shared_image_files.check_image`).

    Args:
        images: pairs (file and line that name the image, path or binary file object); each path is checked once.
        number: number of images, for the progress bar.

    Raises:
        ValueError: images cannot be read; the message names the first five.
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
