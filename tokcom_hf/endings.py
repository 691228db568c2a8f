"""How a recipe ends: what went wrong as one sentence, and the exit code.

    0  the work is done
    1  it was begun and cannot go on: numbers that are not finite, a disk that is full, read-only or gone
    2  it cannot be begun: an argument, a file of the user's
    128 + signal  it was stopped and can go on

Anything else is a fault of the program and shows its traceback.
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

# What a file system answers that cannot keep a run, whatever the file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
# Folder of the run that this process is in.
_folder: HeldFolder | None = None


def writing_into(folder: HeldFolder) -> None:
    """From now on faults of the disk that name no file are about this folder."""
    global _folder
    _folder = folder


def run_recipe(main) -> None:
    """Calls `main()` and ends the process; what ends it early becomes one line on stderr and an exit code.

    SIGTERM and SIGINT end it with 128 + signal, where something is being trained behind a checkpoint (`stopping`).

    Characters that the terminal does not know (a redirected Windows console, LANG=C) are printed as question marks.
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
            # Errors of libraries may have several lines.
            print(f"error: {' '.join(told[0].split())}", file=sys.stderr)
            raise SystemExit(told[1]) from (error if "--traceback" in sys.argv else None)
        leave_together()


def ending(error: Exception) -> tuple[str, int] | None:
    """The sentence that tells an error to the user, and the exit code; None for a fault of the program."""
    if isinstance(error, (WriteError, FloatingPointError)):
        return str(error), FAILED
    fault = _disk_fault(error)
    if fault is not None:
        return str(fault), FAILED
    return (str(error), REFUSED) if isinstance(error, (ValueError, OSError)) else None


def _disk_fault(error: Exception) -> WriteError | None:
    """The error as one about the run's folder, where a file system could not keep what was written."""
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
    """Ends a run of several processes; call it when nothing refers to the trainer any more.

    A rank that leaves while another still listens, or while a wrapped model still owns the group, aborts in the backend's
    threads.
    """
    if dist.is_available() and dist.is_initialized():
        # Trainer and model refer to each other, and the model's reducer to the group.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
