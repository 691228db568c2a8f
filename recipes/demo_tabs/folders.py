"""The folders that recipes leave, and the pipelines on them, loaded when a tab is first used."""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import pipeline


class ModelFolder:
    """A recipe's output folder.

    Args:
        path: the folder.
        task: name of the pipeline that runs its model.
        command: shell command that makes the folder.
    """

    def __init__(self, path: str, task: str, command: str):
        self.path, self.task, self.command = path, task, command
        self.lock, self.loaded = Lock(), None

    def status(self) -> str:
        """One sentence of Markdown: which folder is used, or which command makes it."""
        if (Path(self.path) / "config.json").is_file():
            return f"Model: `{self.path}`, loaded at the first click."
        return f"The folder `{self.path}` holds no model yet. `{self.command}` makes it; then try again, no restart needed."

    def pipeline(self, progress: Callable[..., Any] = lambda *_, **__: None) -> Any:
        """The pipeline; `progress(share, desc=...)` is called before it is loaded and before it runs.

        Raises:
            FileNotFoundError: the folder holds no model; the message names the command that makes one.
        """
        with self.lock:
            if self.loaded is None:
                if not (Path(self.path) / "config.json").is_file():
                    raise FileNotFoundError(self.status().replace("`", ""))
                progress(0.1, desc=f"Loading {self.path}")
                self.loaded = pipeline(self.task, model=self.path)
        progress(0.5, desc="Running")
        return self.loaded
