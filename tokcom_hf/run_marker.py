"""`run.json`: which recipe an output folder belongs to, its stages' settings, and which of them are finished."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hub import RUN_MARKER
from .whole_files import write_text


def read_marker(folder: Path) -> dict[str, Any] | None:
    """`{"recipe": name, "stages": {stage: {"settings": {...}, "finished": bool}}}`, or None where there is none."""
    try:
        marker = json.loads((folder / RUN_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"recipe", "stages"} <= set(marker) else None


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Writes `run.json`; a kill leaves the former one or this one."""
    write_text(folder / RUN_MARKER, json.dumps(marker, indent=2) + "\n")
