"""Reads the file of an offline wandb run: LevelDB's log format (32 KiB blocks of records) holding protobuf messages."""

import json
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD, FILE_HEAD = 32768, 7, 7


def records(path: Path) -> list[Record]:
    data, position, found, parts = path.read_bytes(), FILE_HEAD, [], b""
    assert data[:4] == b":W&B", f"{path} is no run of wandb"
    while position + HEAD <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEAD:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + HEAD : position + HEAD + length]
        position += HEAD + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """Project, name and logged rows (name -> value) of the one run below `folder`; a table's fields are `name.field`."""
    (path,) = folder.rglob("run-*.wandb")
    found = records(path)
    run = next(record.run for record in found if record.HasField("run"))
    rows = []
    for record in found:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return {"project": run.project, "name": run.display_name, "rows": rows}
