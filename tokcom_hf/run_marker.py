"""Reads and writes `run.json`, which records an output folder's recipe, its stages' settings, and whether they finished."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hub import RUN_MARKER
from .whole_files import write_text


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Reads `{"recipe": name, "stages": {stage: {"settings": {...}, "finished": bool}}}`; None if there is no such file."""
    try:
        marker = json.loads((folder / RUN_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"recipe", "stages"} <= set(marker) else None


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Writes `run.json` atomically: after a kill, the file is either the old or the new one."""
    write_text(folder / RUN_MARKER, json.dumps(marker, indent=2) + "\n")
