"""The Hub matrix (matrix.py), cell by cell; with `-s` the table is printed at the end."""

import pytest
from cells import COLUMNS, Bench, run_cell
from matrix import table
from rows import ROWS


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench, cells = Bench(tmp_path_factory.mktemp("matrix")), []
    yield bench, cells
    print("\n" + table(cells))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", COLUMNS)
def test_cell(bench, name, row):
    bench, cells = bench
    cell = run_cell(row, name, bench)
    cells.append(cell)
    if cell.state == "not applicable":
        pytest.skip(f"{name}: {cell.note}")
    assert cell.state == "green", cell.note
