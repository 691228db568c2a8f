"""Manifests: a checkpoint's list of files with their hashes, which proves that the checkpoint is unchanged."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .whole_files import flush

# Holds step, world size, the run's settings, and size and SHA-256 of every file of the checkpoint; written last.
MANIFEST_FILE = "manifest.json"
FORMAT = 1

# Files that `Trainer` loads whenever they exist, so that an extra one is a fault.
_READ = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|distcp)")
# Folders that this process has verified -> sizes and times of their files, so that each is hashed once.
_verified: dict[str, tuple] = {}


def write_manifest(folder: Path, **told: Any) -> None:
    """Writes the manifest of all files below `folder` and flushes it.

    Args:
        folder: a checkpoint whose files are all written and flushed.
        told: further entries: `step`, `world_size`, `resumable` (whether it holds more than weights) and `settings` of the
            run.
    """
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder).items()}
    path = folder / MANIFEST_FILE
    path.write_text(_text({"format": FORMAT, **told, "files": files}), encoding="utf-8")
    flush(path)
    flush(folder)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Reads a checkpoint's manifest; returns None if there is none, as in checkpoints of older releases.

    Raises:
        ValueError: the manifest cannot be read, was changed, or has an unknown format; the message is a phrase.
    """
    try:
        text = (Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST_FILE} lists no files")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} has format {manifest.get('format')!r}, and this release reads {FORMAT}")
    if text != _text({name: value for name, value in manifest.items() if name != "sha256"}):
        raise ValueError(f"{MANIFEST_FILE} was changed after it was written")
    return manifest


def _text(manifest: Mapping[str, Any]) -> str:
    """Returns the JSON text of a manifest, with its own SHA-256 as the last entry."""
    content = json.dumps(manifest, indent=1)
    return json.dumps({**manifest, "sha256": hashlib.sha256(content.encode()).hexdigest()}, indent=1) + "\n"


def files_fault(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns how the files below `folder` differ from those of a manifest, as a phrase, or None if they match."""
    there = _files(folder)
    for name in files:
        if name not in there:
            return f"{name} is missing"
    for name in there:
        if name not in files and _READ.fullmatch(name):
            return f"{name} is not of this checkpoint"
    for name, listed in files.items():
        size = there[name].stat().st_size
        if size != listed["size"]:
            return f"{name} has {size} bytes instead of {listed['size']}"
    times = ((name, there[name].stat()) for name in sorted(files))
    state = tuple((name, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns) for name, seen in times)
    key = str(folder.resolve())
    if _verified.get(key) == state:
        return None
    for name, listed in files.items():
        try:
            if _sha256(there[name]) != listed["sha256"]:
                return f"{name} does not hold what was written (its SHA-256 differs)"
        except OSError:
            return f"{name} cannot be read"
    _verified[key] = state
    return None


def settings_difference(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 8) -> str | None:
    """Lists the settings that differ between two runs, or returns None; settings that only one run has are ignored."""
    differing = [name for name in before if name in now and before[name] != now[name]]
    if not differing:
        return None
    told = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in differing[:most])
    return told + (f" and {len(differing) - most} more" if len(differing) > most else "")


def _files(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST_FILE, None)
    return paths


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
