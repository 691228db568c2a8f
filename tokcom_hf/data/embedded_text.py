"""English prose from the documentation that every Python installation contains."""

import ast
import os
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

# About as much English as the smallest common Python distribution contains; enough to train the tiny recipe.
EMBEDDED_BYTES = 2_000_000
FALLBACK_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "datasets", "huggingface_hub")


def embedded_documents(max_bytes: int = EMBEDDED_BYTES) -> list[str]:
    """Reads English prose from the Python installation: the language reference, then docstrings.

    The documents are `pydoc_data.topics`, then the docstrings of the standard library, file by file in a fixed order. Where
    these are fewer than `max_bytes`, docstrings of the installed dependencies follow. Sources are parsed, never imported.

    Args:
        max_bytes: reading stops at about this many characters.
    """
    documents: list[str] = []
    try:
        from pydoc_data.topics import topics

        documents += [text.strip() for _, text in sorted(topics.items())]
    except ImportError:
        pass
    size = sum(map(len, documents))
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in FALLBACK_PACKAGES:
        spec = find_spec(package)
        roots += [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
    with tqdm(total=max_bytes, initial=size, desc="reading docstrings", unit="B", unit_scale=True, delay=2) as bar:
        for file in chain.from_iterable(map(_source_files, roots)):
            if size >= max_bytes:
                break
            text = "\n\n".join(_docstrings(file))
            if len(text) > 200:
                documents.append(text)
                size += len(text)
                bar.update(len(text))
    return documents


def _source_files(root: Path) -> list[Path]:
    """Python files below `root` in a fixed order, without tests and installed packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "test", "tests")]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text
