"""Atomic writes: after a crash, a file or folder is either complete or as it was before.

Files are written under a name that begins with `.unfinished-`, flushed to the disk, and then renamed into place. A kill or a
full disk therefore leaves the former state and at most a file or folder with such a name, which the next start of the same
run removes.
"""

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# Prefix of the names of files and folders that are still being written.
UNFINISHED_PREFIX = ".unfinished-"
# Subfolder of a model folder into which the model is saved first; it exists only during the save.
UNFINISHED_MODEL = UNFINISHED_PREFIX + "model"

# Removed first and written last, because `from_pretrained` finds no model in a folder without these files.
_HEADS = ("config.json", "adapter_config.json")
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Bytes of the trial write. A disk with less free space counts as full, because file systems reserve the last blocks.
_ROOM = 1 << 16
# Messages of `torch.save` about a failed write.
_TORN = re.compile(r"inline_container|PytorchStreamWriter|Parent directory .* does not exist")


class WriteError(OSError):
    """A run cannot write a file that it needs; the message is a sentence for the user.

    Args:
        text: the message.
        path: file or folder that could not be written.
    """

    def __init__(self, text: str, path: str | Path | None = None):
        super().__init__(text)
        self.path = path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to; at the end of the block the file is flushed and renamed to `path`.

    Raises:
        WriteError: the file cannot be written; a former file at `path` is unchanged.
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
    """Writes a UTF-8 text file atomically, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to save a model into; at the end of the block its files are flushed and renamed into `folder`.

    Other files in `folder` are kept, except weight files of a former model whose names the new one does not use. From the
    first rename to the last, `folder` has no `config.json`, so that a mixture of two models cannot be loaded. A subfolder
    whose files would not change is not touched.

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
    # An unchanged subfolder (the image decoder of an earlier stage) stays readable while the others are replaced.
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
    """Returns whether both files exist and have the same bytes."""
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def reserve(path: str | Path) -> None:
    """Allocates the disk space of a sparse file, so that a full disk raises OSError here and not SIGBUS in a later write."""
    if hasattr(os, "posix_fallocate"):
        with Path(path).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def flush(path: Path) -> None:
    """Waits until the bytes of a file, or the entries of a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Calls `flush` for all files and folders below `folder`, and for `folder` itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def remove(path: Path) -> None:
    """Removes a file, a folder with its contents, or a symbolic link; does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> None:
    """Removes the unfinished files and folders that a killed run left directly in `folder`."""
    for path in Path(folder).glob(UNFINISHED_PREFIX + "*"):
        remove(path)


# ------------------------------------------------------------------ faults
@contextmanager
def told_faults(path: str | Path) -> Iterator[None]:
    """Turns a disk error inside the block into a `WriteError` about `path`."""
    try:
        yield
    except Exception as error:
        cause = write_fault(error, path)
        if cause is None or isinstance(error, WriteError):
            raise
        raise write_error(cause, path) from error


def write_error(cause: str, path: str | Path) -> WriteError:
    """Builds the error of a run that cannot write `path`; `cause` is a phrase such as "No space left on device"."""
    return WriteError(
        f"{cause} while writing {str(path)!r}; earlier checkpoints are unchanged, so solve this problem and resume "
        "with --resume_from_checkpoint true.",
        path,
    )


def write_fault(error: BaseException, path: str | Path) -> str | None:
    """Returns why writing `path` failed, as a phrase; None if `error` is no disk error.

    torch and safetensors raise their own errors for disk errors. Those of torch lack the cause, which a trial write to the
    folder then finds.
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
    """Returns the `errno` with which writing a small file into `folder` fails, or None if it succeeds."""
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
