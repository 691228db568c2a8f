"""What `faults.py` holds a disturbed run against: the undisturbed one, and whether anything is left behind."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_processes import Run


@dataclass
class Case:
    """One row of the long table: a fault, and what was wrong behind it (nothing, if all is well)."""

    suite: str
    job: str
    fault: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def results(folder: Path) -> dict[str, str]:
    """Hashes of the weights that a run has left, by file; those of checkpoints do not count."""
    files = [file for file in folder.rglob("*.safetensors") if not _in_checkpoint(file.relative_to(folder))]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def _in_checkpoint(path: Path) -> bool:
    return any(part.startswith(("checkpoint-", ".unfinished")) for part in path.parts)


def unequal(folder: Path, whole: Path) -> list[str]:
    """Names the weights that differ from the undisturbed run's."""
    ours, theirs = results(folder), results(whole)
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return [f"weights differ: {', '.join(names[:3])}"] if names else []


def left_over(folder: Path) -> list[str]:
    """Names temporary files that nobody removed."""
    found = [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith((".unfinished", ".tmp"))
    ]
    return [f"left behind: {', '.join(found[:3])}"] if found else []


def told(run: Run) -> list[str]:
    """Wrong where a run that ended with an error has not said why in one sentence."""
    if "Traceback" in run.log:
        return ["a traceback"]
    return [] if "error:" in run.log or "stopped by" in run.log else ["no word of what was wrong"]


def steps_lost(before: Run, after: Run) -> int:
    """Steps that the resumed run took again."""
    return len(set(before.steps()) & set(after.steps()))


def seconds_to_resume(run: Run) -> float | None:
    """From the start of the recipe to the end of its first step."""
    begin = next((entry["seconds"] for entry in run.journal if entry["event"] == "begin"), None)
    step = next((entry["seconds"] for entry in run.journal if entry["event"] == "step"), None)
    return None if begin is None or step is None else round(step - begin, 2)


def write_json(path: Path, cases: Iterable[Case], more: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bad = [vars(case) for case in cases if case.wrong]
    path.write_text(json.dumps(more | {"wrong": bad}, indent=2) + "\n", encoding="utf-8")
