"""Detects that the folder a run writes into was removed or replaced."""

import os
import weakref
from pathlib import Path

from .whole_files import WriteError


class HeldFolder:
    """Keeps an open handle of a folder, which distinguishes it from a later folder of the same name."""

    def __init__(self):
        self.path: Path | None = None
        self._handle: int | None = None

    def hold(self, path: str | Path) -> None:
        """Creates the folder if it does not exist, and opens the handle for `check`."""
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if os.name != "nt":  # Windows cannot open folders
            self._handle = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)

    def check(self) -> None:
        """Checks that the folder is still the one of `hold`; does nothing before `hold` was called.

        Raises:
            WriteError: the folder was removed or replaced.
        """
        if self.path is None:
            return
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or (self._handle is not None and not os.path.samestat(os.fstat(self._handle), now)):
            raise WriteError(
                f"The folder {str(self.path)!r} was removed or replaced while a run was writing into it; its files are "
                "gone, so start the run again.",
                self.path,
            )
