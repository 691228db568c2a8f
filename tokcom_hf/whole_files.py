"""Files and folders that are there whole or not at all.

What is written has a name that begins with `.unfinished-` until every byte of it is on the disk; a rename then puts it in
its place. A kill or a full disk therefore leaves the former state and at most something under such a name, which the next
start of the same run removes.
"""

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# Beginning of the name of everything that is being written and not yet in its place.
UNFINISHED_PREFIX = ".unfinished-"
# Folder inside a model's in which the final save is written; it exists only while that is being done.
UNFINISHED_MODEL = UNFINISHED_PREFIX + "model"

# `from_pretrained` finds no model in a folder without them: they go first and come back last.
_HEADS = ("config.json", "adapter_config.json")
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# A disk with less room than this is full: file systems keep the last blocks for themselves.
_ROOM = 1 << 16
# What `torch.save` says of a write that failed.
_TORN = re.compile(r"inline_container|PytorchStreamWriter|Parent directory .* does not exist")


class WriteError(OSError):
    """A run cannot write what it has to keep; the message is a sentence for the user.

    Args:
        text: the sentence.
        path: file or folder that it is about.
    """

    def __init__(self, text: str, path: str | Path | None = None):
        super().__init__(text)
        self.path = path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Inside the block the path to write to; after it the file is flushed and at `path`.

    Raises:
        WriteError: the file cannot be written; a former one at `path` is as it was.
    """
    path = Path(path)
    unfinished = path.with_name(f"{UNFINISHED_PREFIX}{os.getpid()}-{path.name}")
    try:
        with told_faults(path):
            yield unfinished
            flush(unfinished)
            unfinished.replace(path)
            flush(path.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Inside the block an empty folder to write a model's files into; after it they are flushed and in `folder`.

    Other files of `folder` stay, except weights of a former model under names that the new one does not use. Between the
    first rename and the last one `folder` holds no `config.json`, so that nothing loads a mixture of two models. A subfolder
    whose files would not change is left alone.

    Raises:
        WriteError: the files cannot be written.
    """
    folder = Path(folder)
    unfinished = folder / UNFINISHED_MODEL
    with told_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove(unfinished)
        unfinished.mkdir()
    try:
        with told_faults(folder):
            yield unfinished
            flush_tree(unfinished)
            _into_place(unfinished, folder)
    finally:
        with suppress(OSError):
            remove(unfinished)


def _into_place(unfinished: Path, folder: Path) -> None:
    every = [path.relative_to(unfinished) for path in sorted(unfinished.rglob("*")) if path.is_file()]
    # A part that is as it was (the image decoder of an earlier stage) stays readable while the others are replaced.
    new = {name.parent for name in every if not _same(unfinished / name, folder / name)}
    files = [name for name in every if name.parent in new]
    heads = [name for name in files if name.name in _HEADS]
    for name in heads:
        (folder / name).unlink(missing_ok=True)
    for place in {name.parent for name in every if _WEIGHTS.fullmatch(name.name)}:
        for former in (folder / place).glob("*.safetensors*"):
            if _WEIGHTS.fullmatch(former.name) and place / former.name not in every:
                former.unlink()
    flush(folder)
    for name in [name for name in files if name not in heads] + heads:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).replace(folder / name)
    for place in {(folder / name).parent for name in files}:
        flush(place)


def _same(first: Path, second: Path) -> bool:
    """Whether both files are there with the same bytes."""
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def reserve(path: str | Path) -> None:
    """Takes the room of a sparse file, so that a full disk raises OSError here and does not kill the one who maps it."""
    if hasattr(os, "posix_fallocate"):
        with Path(path).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # folders have no handles there
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` for everything below `folder`, and for itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def remove(path: Path) -> None:
    """Removes a file, a folder with all it holds, or a link; does nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> None:
    """Removes what a killed run left directly in `folder` before it was in its place."""
    for path in Path(folder).glob(UNFINISHED_PREFIX + "*"):
        remove(path)


# ------------------------------------------------------------------ faults
@contextmanager
def told_faults(path: str | Path) -> Iterator[None]:
    """Raises a `WriteError` about `path` where writing inside the block fails for the disk's sake."""
    try:
        yield
    except Exception as error:
        cause = write_fault(error, path)
        if cause is None or isinstance(error, WriteError):
            raise
        raise write_error(cause, path) from error


def write_error(cause: str, path: str | Path) -> WriteError:
    """The error that ends a run which cannot write `path`."""
    return WriteError(
        f"{cause} while writing {str(path)!r}; checkpoints saved before are as they were, so put this right and go on "
        "with --resume_from_checkpoint true.",
        path,
    )


def write_fault(error: BaseException, path: str | Path) -> str | None:
    """Why writing `path` failed, in a few words; None where `error` is not the disk's.

    torch and safetensors tell such faults in errors of their own, torch without the cause: the folder is then tried.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    if found is not None:
        return os.strerror(int(found.group(1)))
    torn = isinstance(error, RuntimeError) and _TORN.search(str(error))
    if not torn and not isinstance(error, OSError):
        return None
    folder = Path(path).parent
    number = folder_fault(folder if folder.is_dir() else folder.parent)
    if number is None:
        return "A failed write" if torn else None
    return os.strerror(number)


def folder_fault(folder: str | Path) -> int | None:
    """The `errno` with which writing a small file into `folder` fails, or None where that works."""
    trial = Path(folder) / (UNFINISHED_PREFIX + "trial")
    try:
        try:
            with trial.open("wb") as file:
                file.write(bytes(_ROOM))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        return error.errno
    return None
