"""Saved folders outlive the code: those in tests/data/former/ load, and compute what they computed when they were written.

Version 0.2.0 wrote them in November 2026, one for each row of the matrix, before any module was moved.

A new row gets its folder by `python tests/hub/test_former_folders.py`; existing folders are never written again.
"""

from pathlib import Path

import pytest
import transformers
from rows import ROWS, Row, difference, outputs, slug
from safetensors.torch import load_file, save_file

import tokcom_hf  # noqa: F401

FOLDERS = Path(__file__).parents[1] / "data" / "former"


@pytest.mark.minima
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_former_folder_computes_what_it_computed(row):
    folder = FOLDERS / slug(row.name)
    model = getattr(transformers, row.auto_class).from_pretrained(folder)
    former, now = load_file(folder / "outputs.safetensors"), outputs(row, model)
    # What the sparsity loss was then, the entropy of the scores, has its own name now.
    renamed = {name: name.replace("sparsity_loss", "entropy_loss") for name in former}
    # Outputs may be added, by us and by transformers.
    now = {name: now[renamed[name]] for name in former}
    # Rounding differs between processors; decisions (ids, codes, kept tokens) must not.
    assert difference(now, former) <= 1e-4


def test_there_is_no_folder_without_a_row():
    assert {path.name for path in FOLDERS.iterdir()} == {slug(row.name) for row in ROWS}


def write(row: Row) -> None:
    """Saves the row's model without its code, and what it computes."""
    folder, model = FOLDERS / slug(row.name), row.build()
    model.save_pretrained(folder, **({"include_base": True} if row.composite else {}))
    for code in folder.rglob("*.py"):
        code.unlink()
    save_file(
        {name: value.contiguous() for name, value in outputs(row, model).items()}, folder / "outputs.safetensors"
    )


if __name__ == "__main__":
    for row in ROWS:
        if not (FOLDERS / slug(row.name)).exists():
            write(row)
            print(f"wrote {slug(row.name)}")
