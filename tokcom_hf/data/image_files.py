"""Lists the image files of a folder."""

import os
import warnings
from collections import Counter
from pathlib import Path

from ..models.shared_image_files import SUFFIXES


def image_files(folder: str | Path) -> list[Path]:
    """Lists the image files of a folder and its subfolders, sorted; a file counts by its suffix, in any letter case.

    Symbolic links to folders are followed; a folder that is reached twice, for example through a cycle of links, counts
    once. Names that begin with a dot are left out: previews, notebook checkpoints, the `._` files of macOS.

    Raises:
        NotADirectoryError: `folder` does not exist or is a file.
        PermissionError: a subfolder cannot be read.
        ValueError: the folder contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist or is not a folder"
        raise NotADirectoryError(f"Image folder {str(folder)!r} {state}.")
    files, others, dangling, seen = [], Counter[str](), [], set()
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Real folders before links, so that a folder is listed under its own name, not under that of a link beside it.
        folders[:] = sorted(
            (name for name in folders if name[0] != "."), key=lambda name: (os.path.islink(Path(root, name)), name)
        )
        for name in names:
            path, suffix = Path(root, name), Path(name).suffix.lower()
            if name[0] == ".":
                continue
            if not path.exists():
                dangling.append(str(path))
            elif path.is_file() and suffix in SUFFIXES:
                files.append(path)
            else:
                others[suffix or "no suffix"] += 1
    if dangling:
        warnings.warn(f"{len(dangling)} links in {str(folder)!r} are broken: {sorted(dangling)[:5]}.", stacklevel=2)
    if not files:
        found = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise ValueError(f"No images in {str(folder)!r}; looked for {', '.join(SUFFIXES)}, found {found}.")
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error
