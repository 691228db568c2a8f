"""Reads text and JSON lines files; every error message names file and line."""

import codecs
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

JSON_LINES = (".jsonl", ".ndjson", ".json")
# Suffixes of files that are refused: compressed files and tables are no plain text.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
# Maximum characters of a JSON line, because a binary file may be a single line larger than memory.
LONGEST_LINE = 1 << 26
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def is_json_lines(path: str | Path) -> bool:
    """Returns whether the file has a suffix of JSON lines (`.jsonl`, `.ndjson`, `.json`), in any letter case.

    Raises:
        ValueError: the suffix is that of a compressed file or a table.
    """
    _check_kind(Path(path))
    return Path(path).suffix.lower() in JSON_LINES


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark; line ends become `\\n`.

    Raises:
        OSError: no such file, a folder, or no permission.
        ValueError: not UTF-8; the message names the line.
    """
    parts, line = [], 1
    with _open(path) as file:
        # Read in parts, so that a large binary file is refused before it fills the memory.
        while part := file.read(LONGEST_LINE):
            _check_encoding(path, part, line)
            line += part.count("\n")
            parts.append(part)
    return "".join(parts)


def read_json_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `("FILE, line N", object)` of a UTF-8 file with one JSON object per line; blank lines are skipped.

    A byte order mark and `\\r\\n` are accepted, and so are control characters and separators (U+2028, U+0085 …) in strings.

    Raises:
        OSError: no such file, a folder, or no permission.
        ValueError: the file is compressed or a table; or a line is not UTF-8, is longer than `LONGEST_LINE` characters, is
            no JSON object, or holds a duplicate key, NaN, an infinite number, or half of a surrogate pair. The message
            names the line.
    """
    # Not splitlines(): a JSON string may hold a line separator (U+2028) as it is.
    with _open(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), ""), 1):
            _check_encoding(path, line, number)
            if len(line) == LONGEST_LINE:
                raise ValueError(
                    f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; write one object on each line."
                )
            line = line.lstrip("\ufeff")  # joined files have byte order marks inside
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse(line, place)


def _open(path: str | Path):
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a text file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"Text file {str(path)!r} does not exist.")
    _check_kind(path)
    # Bytes that are not UTF-8 become lone surrogates, by which `_check_encoding` finds them.
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def _check_kind(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise ValueError(f"{path} is compressed; unpack it first.")
    if suffix in TABLES:
        raise ValueError(f"{path} is a table; write it as JSON lines (.jsonl), one object per row.")


def _check_encoding(path: str | Path, text: str, line: int) -> None:
    if text.isascii() and "\0" not in text:
        return
    wrong, reason = text.find("\0"), "it holds a zero byte; it may be UTF-16 or a binary file"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if wrong < 0 or error.start < wrong:
            wrong, reason = error.start, f"byte 0x{ord(text[error.start]) - 0xDC00:02x}"
    if wrong < 0:
        return
    with Path(path).open("rb") as file:
        head = file.read(4)
    for mark, name in OTHER_MARKS.items():
        if head.startswith(mark):
            reason = f"it is {name}"
            break
    line += text.count("\n", 0, wrong)
    raise ValueError(f"{path}, line {line}: not UTF-8 text ({reason}); save it as UTF-8.")


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        # Not strict: control characters inside a string, such as tabs, are harmless.
        record = json.loads(
            line,
            strict=False,
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        opened = line.strip() in ("[", "{", "[{")
        hint = "; JSON lines hold one object per line, not one document over many lines" if opened else ""
        raise ValueError(f"{place}: not JSON ({error.msg}{hint}).") from None
    except RecursionError:
        raise ValueError(f"{place}: not JSON that can be read (nested too deeply).") from None
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not a JSON object but {_kind(record)}; write {{...}} on each line.")
    # UTF-8 cannot encode lone surrogates, so one can only come from an escape sequence.
    if "\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(
                f"{place}: not text (\\u{half:04x} is half of a surrogate pair, for example of an emoji cut in two); mend "
                "or remove it."
            ) from None
    return record


def _no_number(name: str):
    raise ValueError(f"{name} is not a JSON number; write null")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is outside the range of a float")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return record


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
