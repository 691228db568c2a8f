"""Whether the folder that a run writes into is still the one it began with."""

import os
import weakref
from pathlib import Path

from .whole_files import WriteError


class HeldFolder:
    """Keeps a handle of a folder, by which one of the same name that somebody made later is told from it."""

    def __init__(self):
        self.path: Path | None = None
        self._handle: int | None = None

    def hold(self, path: str | Path) -> None:
        """From now on `check` is about this folder, which is made where it does not exist."""
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if os.name != "nt":  # folders have no handles there
            self._handle = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)

    def check(self) -> None:
        """Does nothing before `hold`.

        Raises:
            WriteError: the folder has been removed or replaced.
        """
        if self.path is None:
            return
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or (self._handle is not None and not os.path.samestat(os.fstat(self._handle), now)):
            raise WriteError(
                f"The folder {str(self.path)!r} was removed or replaced while a run was writing into it; what it held is "
                "gone, so start the run again.",
                self.path,
            )
