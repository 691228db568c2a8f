"""Text and JSON lines files as people have them, and errors that name file and line."""

import json

import pytest

from tokcom_hf.data.text import load_documents, load_text_rows
from tokcom_hf.data.text_files import is_json_lines, read_json_objects, read_text

GOOD = b'{"text": "a good line"}\n'


def records(path, content: bytes):
    path.write_bytes(content)
    return [record for _, record in read_json_objects(path)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\t"])
@pytest.mark.parametrize("escaped", [True, False])
def test_no_separator_inside_a_string_ends_a_line(tmp_path, separator, escaped):
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    lines = [json.dumps(row) if escaped else f'{{"text": "{row["text"]}"}}' for row in rows]
    assert records(tmp_path / "a.jsonl", "\n".join(lines).encode()) == rows


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_of_every_system_blank_lines_and_a_byte_order_mark(tmp_path, end, mark):
    content = mark + end.join([b'{"text": "\xc3\xa9"}', b"", b"  ", b'{"text": "b"}']) + end
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert list(read_json_objects(path)) == [(f"{path}, line 1", {"text": "é"}), (f"{path}, line 4", {"text": "b"})]
    (tmp_path / "a.txt").write_bytes(mark + end.join([b"one", b"two", b"", b"", b"three"]))
    assert load_documents(str(tmp_path / "a.txt")) == ["one\ntwo", "three"]


def test_files_joined_with_their_byte_order_marks_are_read(tmp_path):
    assert records(tmp_path / "a.jsonl", 2 * (b"\xef\xbb\xbf" + GOOD)) == 2 * [{"text": "a good line"}]


def test_a_line_may_be_long_and_hold_anything_that_is_json(tmp_path):
    row = {"text": "é" * 3_000_000, "more": {"a": [1, None, True, 1e300]}, "emoji": "🦊"}
    assert records(tmp_path / "a.jsonl", json.dumps(row).encode()) == [row]
    assert records(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False).encode()) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut \\ud83d here"}', r"\\ud83d is half of a surrogate pair"),
        (b'{"text": "cut \\ude00\\ud83d here"}', r"\\ude00 is half of a surrogate pair"),
        (b'{"other": [{"deep": "\\udfff"}], "text": "a"}', r"\\udfff is half"),
        (b'{"\\ud800": 1}', r"\\ud800 is half"),
        (b'{"text": "caf\xe9"}', r"not UTF-8 text \(byte 0xe9\); save it as UTF-8"),
        (b'{"text": "\xed\xa0\xbd"}', "not UTF-8 text"),
        (b'{"text": "a\x00b"}', "zero byte"),
        (b"[1, 2]", "not a JSON object but an array"),
        (b'"text"', "not a JSON object but a string"),
        (b"3", "not a JSON object but a number"),
        (b"null", "not a JSON object but null"),
        (b"true", "not a JSON object but true or false"),
        (b'{"text": ', "not JSON"),
        (b"prose", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "a", "score": NaN}', "NaN is not a JSON number"),
        (b'{"text": "a", "score": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b"{", "one object per line, not one document over many lines"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    for before in (1, 60):
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line {before + 1}: .*(?:{message})"):
            records(path, GOOD * before + line + b"\n" + GOOD)
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line {before + 1}: "):
            load_text_rows(str(path), vocab_size=300, length=16)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused_at_their_line(tmp_path, encoding, name):
    path = tmp_path / name
    text = '{"text": "plain"}\n' * (1 if encoding.startswith("utf") else 3) + '{"text": "naïve café"}\n'
    path.write_bytes(text.encode(encoding))
    line = 1 if encoding.startswith("utf") else 4
    with pytest.raises(ValueError, match=rf"{name}, line {line}: not UTF-8 text") as caught:
        load_documents(str(path))
    marks = {"utf-16": "it is UTF-16", "utf-32": "it is UTF-32", "latin-1": "byte 0xef"}
    assert marks.get(encoding, "") in str(caught.value) and "save it as UTF-8" in str(caught.value)


def test_bytes_that_are_no_text_are_refused_as_prose(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\nmore\0text")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8 text \(it holds a zero byte"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["TRAIN.JSONL", "train.ndjson", "Train.NdJson", "train.json", "train.Jsonl"])
def test_json_lines_by_any_of_their_names(tmp_path, name):
    assert is_json_lines(name)
    (tmp_path / name).write_bytes(b'{"text": "first"}\n{"text": "second"}\n')
    assert load_documents(str(tmp_path / name)) == ["first", "second"]


def test_a_json_array_is_no_json_lines_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(ValueError, match=r"a\.json, line 1: not JSON .*one object per line"):
        load_documents(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "message"), [("a.jsonl.gz", "compressed; unpack"), ("A.CSV", "is a table"), ("a.parquet", "is a table")]
)
def test_files_that_are_neither_prose_nor_json_lines_are_refused(tmp_path, name, message):
    (tmp_path / name).write_text("text\na,b\n")
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))
    assert not is_json_lines("notes.md") and not is_json_lines("notes")
