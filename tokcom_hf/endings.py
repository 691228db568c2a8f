"""Ends a recipe: prints an error as one sentence and sets the exit code.

    0  the recipe has finished
    1  the recipe had started and cannot continue: values are not finite, or the disk is full, read-only or gone
    2  the recipe could not start: an argument or a file of the user is invalid
    128 + signal  the recipe was stopped by a signal and can be resumed

Any other error is a bug in the program and prints its traceback.
"""

import errno
import gc
import os
import sys

import torch.distributed as dist

from .held_folder import HeldFolder
from .stopping import Stopped, report_stop, stop_on_signals
from .whole_files import WriteError, write_error, write_fault

FAILED, REFUSED = 1, 2

# Errors of the file system as a whole, not of a single file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
# Output folder of this process's run.
_folder: HeldFolder | None = None


def writing_into(folder: HeldFolder) -> None:
    """Registers the run's output folder, which later disk errors are about if they name no file."""
    global _folder
    _folder = folder


def run_recipe(main) -> None:
    """Calls `main()` and ends the process; an error becomes one line on stderr and an exit code.

    SIGTERM and SIGINT end the process with 128 + signal; during training a checkpoint is saved first (`stopping`).
    Characters that the terminal cannot encode (a redirected Windows console, LANG=C) are printed as question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with stop_on_signals():
        try:
            main()
        except Stopped as stopped:
            report_stop(stopped)
            leave_together()
            raise
        except Exception as error:
            told = ending(error)
            if told is None:
                raise
            # Messages of libraries may have several lines; they are joined into one.
            print(f"error: {' '.join(told[0].split())}", file=sys.stderr)
            raise SystemExit(told[1]) from (error if "--traceback" in sys.argv else None)
        leave_together()


def ending(error: Exception) -> tuple[str, int] | None:
    """Returns the error message for the user and the exit code; None if the error is a bug in the program."""
    if isinstance(error, (WriteError, FloatingPointError)):
        return str(error), FAILED
    fault = _disk_fault(error)
    if fault is not None:
        return str(fault), FAILED
    return (str(error), REFUSED) if isinstance(error, (ValueError, OSError)) else None


def _disk_fault(error: Exception) -> WriteError | None:
    """Returns the error as a `WriteError` about the file or the run's folder if it is a disk error, else None."""
    place = None if _folder is None else _folder.path
    file = error.filename if isinstance(error, OSError) else None
    if isinstance(error, OSError) and error.errno in _DISK:
        return write_error(os.strerror(error.errno), file or place or "a file")
    if place is None or _folder is None or (file is not None and not _is_below(file, place)):
        return None
    cause = write_fault(error, place / "a file")
    if cause is None:
        return None
    try:
        _folder.check()
    except WriteError as gone:
        return gone
    return write_error(cause, file or place)


def _is_below(file, folder) -> bool:
    return isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep)


def leave_together() -> None:
    """Ends a run of several processes together; call it when nothing refers to the trainer any more.

    A rank aborts in the backend's threads if it exits while another rank still communicates, or while a wrapped model still
    holds the process group.
    """
    if dist.is_available() and dist.is_initialized():
        # Trainer and model refer to each other, and the model's gradient reducer holds the process group: only gc frees it.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
