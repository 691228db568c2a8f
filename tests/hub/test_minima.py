"""What every declared version of the libraries must do: import, and for every model save, load, remote code, forward,
generate and two training steps. It runs on the declared minima as well, where the whole suite is too long."""

import pytest
import torch
from cells import Bench
from rows import ROWS, difference


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("minima"))


@pytest.mark.minima
@pytest.mark.parametrize("kind", ["package", "remote"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_saved_folder_computes_generates_and_trains_in_another_process(bench, row, kind):
    found = bench.process(kind)[row.name]
    assert "error" not in found, found["error"]
    home = "tokcom_hf.models." if kind == "package" else "transformers_modules."
    for auto_class in dict.fromkeys(("AutoModel", row.auto_class)):
        assert found[auto_class]["module"].startswith(home)
        assert difference(bench.expected(row), found[auto_class]["outputs"]) == 0
    if row.generate is not None:
        torch.manual_seed(0)
        assert torch.equal(found["generated"], row.generate(bench.model(row)))
    first, _, last = found["losses"]
    assert last < first
    assert set(found["parts"]) == set(row.parts)
