"""Checks of a disturbed run: equal weights, no temporary files, a clear error message; steps lost, seconds to resume."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_processes import Run


@dataclass
class Case:
    """One disturbed run and what was found.

    Attributes:
        suite: section of `faults.py`.
        job: name of the run in `faults_jobs.JOBS`.
        fault: what happened to it, and when.
        wrong: what is not as it should be; empty if all is right.
        seconds: until the disturbed run ended.
        figures: what was measured, such as steps `lost` and seconds `to_resume`.
    """

    suite: str
    job: str
    fault: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def results(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file that a run has left, by relative path, without those of checkpoints."""
    files = [file for file in folder.rglob("*.safetensors") if not _in_checkpoint(file.relative_to(folder))]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def _in_checkpoint(path: Path) -> bool:
    return any(part.startswith(("checkpoint-", ".unfinished")) for part in path.parts)


def unequal(folder: Path, whole: Path) -> list[str]:
    """Names the weight files that differ from those of the undisturbed run in `whole`."""
    found, expected = results(folder), results(whole)
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return [f"weights differ: {', '.join(names[:3])}"] if names else []


def left_over(folder: Path) -> list[str]:
    """Names temporary files that nobody removed."""
    found = [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith((".unfinished", ".tmp"))
    ]
    return [f"left behind: {', '.join(found[:3])}"] if found else []


def told(run: Run) -> list[str]:
    """What is wrong with the error message of a run that failed: a traceback, or no message at all."""
    if "Traceback" in run.log:
        return ["a traceback"]
    return [] if "error:" in run.log or "stopped by" in run.log else ["no error message"]


def steps_lost(before: Run, after: Run) -> int:
    """Number of steps that the resumed run took again."""
    return len(set(before.steps()) & set(after.steps()))


def seconds_to_resume(run: Run) -> float | None:
    """Seconds from the start of the recipe to the end of its first step; None if it took none."""
    begin = next((entry["seconds"] for entry in run.journal if entry["event"] == "begin"), None)
    step = next((entry["seconds"] for entry in run.journal if entry["event"] == "step"), None)
    return None if begin is None or step is None else round(step - begin, 2)


def write_json(path: Path, cases: Iterable[Case], more: dict[str, Any]) -> None:
    """Writes `more` and the cases in which something was wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bad = [vars(case) for case in cases if case.wrong]
    path.write_text(json.dumps(more | {"wrong": bad}, indent=2) + "\n", encoding="utf-8")
