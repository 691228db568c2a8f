"""Malformed JSON lines and text files, for every reader of the package."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import infer_tokcom
from faults_malformed_check import Case, at_command_line
from PIL import Image

from tokcom_hf.data.captions import read_image_text_jsonl
from tokcom_hf.data.text import load_documents
from tokcom_hf.data.vqa import read_vqa_jsonl

GOOD = {"text": "a text", "image": "a.png", "caption": "red", "question": "colour ?", "answer": "red"}
# Malformed second lines, which every reader must refuse.
LINES = {
    "cut off": b'{"text": "a',
    "no JSON": b"hello there",
    "an array": b'["a", "b"]',
    "a string": b'"a"',
    "a number": b"17",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"text": "a", "weight": NaN}',
    "Infinity": b'{"text": "a", "weight": -Infinity}',
    "a number too large": b'{"text": "a", "weight": 1e999}',
    "a number of 5000 digits": b'{"text": "a", "weight": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"text": "a", "text": "b"}',
    "a zero byte": b'{"text": "a\0b"}',
    "half a surrogate pair": b'{"text": "a \\ud83d b"}',
    "Latin-1": '{"text": "Größe"}'.encode("latin-1"),
    "a cut UTF-8 character": '{"text": "é"}'.encode()[:-3] + b'"}',
    "nested 100,000 times": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two objects": b'{"text": "a"} {"text": "b"}',
    "a trailing comma": b'{"text": "a",}',
    "single quotes": b"{'text': 'a'}",
    "a comment": b'{"text": "a"} // note',
    "a Python literal": b'{"text": None}',
    "an unquoted key": b'{text: "a"}',
    "a line break in a string": b'{"text": "a\nb"}',
    "an open bracket": b"[",
}
# Fields that make a well-formed second line useless to a reader.
FIELDS = {
    "documents": {
        "text is a number": {"text": 3},
        "text is a list": {"text": ["a"]},
        "text is an object": {"text": {"a": 1}},
        "text is null": {"text": None},
        "text is false": {"text": False},
        "no text": {"body": "a"},
    },
    "questions": {
        "no question": {"question": None},
        "question is a list": {"question": ["a"]},
        "question is a number": {"question": 3},
        "no answer": {"answer": None},
        "answer is an empty list": {"answer": []},
        "answer is an object": {"answer": {"a": 1}},
        "answer is a list of lists": {"answer": [["a"]]},
        "answer is true": {"answer": True},
        "answer is a list of null": {"answer": [None]},
        "type is an object": {"type": {"a": 1}},
    },
    "captions": {
        "no caption": {"caption": None},
        "caption is a number": {"caption": 3},
        "caption is a list": {"caption": ["a"]},
        "question without answer": {"answer": None},
        "question is a number": {"question": 3},
        "no image": {"image": None},
    },
}
IMAGES = {
    "image is a number": {"image": 3},
    "image is a list": {"image": ["a.png"]},
    "image is blank": {"image": "  "},
    "image is missing": {"image": "missing.png"},
    "image is a folder": {"image": "folder.png"},
    "image is a URL": {"image": "https://example.com/a.png"},
    "image is a data URI": {"image": "data:image/png;base64,AAAA"},
    "image is a file URI": {"image": "file:///etc/hostname"},
    "image is absolute": {"image": "/etc/hostname"},
    "image leaves the folder": {"image": "../../a.png"},
    "image leaves the folder inside": {"image": "a/../../a.png"},
    "image has a zero byte": {"image": "a\0.png"},
    "image is empty": {"image": "empty.png"},
    "image is text": {"image": "text.png"},
    "image is cut short": {"image": "cut.png"},
    "image has a very long name": {"image": "a" * 5000},
}
READERS = {
    "documents": lambda path: load_documents(path),
    "questions": lambda path: read_vqa_jsonl(path),
    "captions": lambda path: read_image_text_jsonl(path),
}


def cases(folder: Path) -> Iterator[Case]:
    """Writes the files into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "folder.png").mkdir(exist_ok=True)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture", encoding="utf-8")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    good = json.dumps(GOOD).encode()
    for reader, read in READERS.items():
        lines = LINES | {name: json.dumps(GOOD | field).encode() for name, field in FIELDS[reader].items()}
        if reader != "documents":
            lines |= {name: json.dumps(GOOD | field).encode() for name, field in IMAGES.items()}
        if reader == "documents":
            lines["no text"] = b'{"body": "a"}'
        for number, (name, line) in enumerate(lines.items()):
            path = folder / f"{reader}_{number}.jsonl"
            path.write_bytes(good + b"\n" + line + b"\n")
            yield Case("JSON lines", f"{reader}: {name}", partial(read, path), (f"{path.name}, line 2",))
        for number, (name, content) in enumerate(files(good).items()):
            path = folder / f"{reader}_file_{number}.jsonl"
            if content is None:
                path.write_bytes(b"")
                os.truncate(path, 1 << 40)  # sparse: takes no disk space
            else:
                path.write_bytes(content)
            fine = name.startswith("good")
            yield Case("JSON lines", f"{reader}: {name}", partial(read, path), (path.name,), fine)
        for name in ("missing.jsonl", "folder.png", "rows.jsonl.gz", "rows.csv"):
            path = folder / name
            if name.startswith("rows"):
                path.write_bytes(good)
            yield Case("JSON lines", f"{reader}: {name}", partial(read, path), (name,), False)
    yield from text_files(folder)
    yield from commands(folder)


def files(good: bytes) -> dict[str, bytes | None]:
    """Contents of whole files, by description; None stands for a sparse file of a terabyte."""
    return {
        "good": good + b"\n",
        "good with a byte order mark, CRLF and blank lines": b"\xef\xbb\xbf" + good + b"\r\n\r\n" + good,
        "empty": b"",
        "blank": b"\n \n\t\n",
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-32": good.decode().encode("utf-32"),
        "one document over many lines": json.dumps([GOOD], indent=1).encode(),
        "binary": bytes(range(256)) * 20,
        "a terabyte without a line break": None,
        "a line of 70 million letters": b'{"text": "' + b"a" * 70_000_000 + b'"}',
    }


def text_files(folder: Path) -> Iterator[Case]:
    """Plain text, as `--train_file corpus.txt` reads it."""
    contents = {
        "good": b"One.\n\n\nTwo.",
        "empty": b"",
        "blank": b" \n\n",
        "Latin-1": "Größe".encode("latin-1"),
        "UTF-16": "text".encode("utf-16"),
        "a zero byte": b"a\0b",
        "binary": bytes(range(256)),
        "surrogates": b"\xed\xa0\x80",
        "overlong": b"\xc0\xaf",
        "a terabyte": None,
    }
    for number, (name, content) in enumerate(contents.items()):
        path = folder / f"text_{number}.txt"
        path.write_bytes(content or b"")
        if content is None:
            os.truncate(path, 1 << 40)
        yield Case("text files", name, partial(load_documents, path), (path.name,), name == "good")
    for name in ("missing.txt", "folder.png", "a.tar", "a.parquet", "a.zip"):
        if name.startswith("a."):
            (folder / name).write_bytes(b"PK")
        yield Case("text files", name, partial(load_documents, folder / name), (name,))


def commands(folder: Path) -> Iterator[Case]:
    """The same files at the command line of infer_tokcom.py, which reads them before it loads a model."""
    for name in sorted(path.name for path in folder.glob("documents_*.jsonl") if "file" not in path.name)[:12]:
        argv = ["--mode", "reconstruct", "--input_file", str(folder / name), "--model", str(folder / "no_model")]
        run = partial(at_command_line, infer_tokcom.main, argv)
        yield Case("JSON lines", f"infer_tokcom --input_file {name}", run, (f"{name}, line 2",))
