"""Runs of lines that stand in two places."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .house import ROOT, parsed


@dataclass(frozen=True)
class Line:
    number: int
    text: str


def lines_of(path: Path) -> list[Line]:
    """A file's lines that say something: no blank ones, comments, imports, or brackets alone; spaces folded."""
    passed: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            passed |= set(range(node.lineno, node.end_lineno + 1))
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = " ".join(line.split())
        if number not in passed and re.search(r"\w", text) and not text.startswith("#"):
            found.append(Line(number, text))
    return found


def repeated_runs(paths: Iterable[Path], shortest: int = 6) -> list[str]:
    """Pairs of places that share a run of at least `shortest` lines, each pair once, at its full length."""
    files = [(path, lines_of(path)) for path in paths]
    windows: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for index, (_, lines) in enumerate(files):
        for start in range(len(lines) - shortest + 1):
            windows[tuple(line.text for line in lines[start : start + shortest])].append((index, start))

    def same(one: tuple[int, int], other: tuple[int, int], offset: int) -> bool:
        (a, i), (b, j) = one, other
        i, j = i + offset, j + offset
        inside = 0 <= i < len(files[a][1]) and 0 <= j < len(files[b][1])
        return inside and files[a][1][i].text == files[b][1][j].text

    found = []
    for places in windows.values():
        for number, one in enumerate(places):
            for other in places[number + 1 :]:
                overlap = one[0] == other[0] and other[1] - one[1] < shortest
                if overlap or same(one, other, -1):  # the run begins earlier, and is counted there
                    continue
                length = shortest
                while same(one, other, length):
                    length += 1
                sides = [
                    f"{files[index][0].relative_to(ROOT)}:{files[index][1][start].number}"
                    for index, start in (one, other)
                ]
                found.append(f"{' ~ '.join(sides)}: {length} lines")
    return found
