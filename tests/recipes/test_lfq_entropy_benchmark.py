"""recipes/benchmarks/lfq_entropy.py: both sides compute the same thing, from one command."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.recipes import load

PATH = Path(__file__).parents[2] / "recipes" / "benchmarks" / "lfq_entropy.py"


@pytest.fixture
def benchmark():
    return load("lfq_entropy")


def test_values_and_gradients_of_both_agree_in_float64(benchmark):
    worst = benchmark.agreement(width=9, tokens=50)
    assert set(worst) == {"sample_entropy", "batch_entropy", "gradient"} and max(worst.values()) < 1e-10


@pytest.mark.slow
def test_the_command_compares_both_and_writes_what_it_prints(benchmark, monkeypatch, tmp_path, capsys):
    path = tmp_path / "entropy.json"
    options = ["--tokens", "512", "--output_dim", "12", "--steps", "1", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(PATH), *options, "--output", str(path)])
    benchmark.main()
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["dense"]["batch_entropy"] == pytest.approx(report["factorised"]["batch_entropy"], rel=1e-4)
    assert report["dense"]["sample_entropy"] == pytest.approx(report["factorised"]["sample_entropy"], rel=1e-4)
    assert f"{report['speedup']:.0f} x faster" in capsys.readouterr().out
    assert report["speedup"] == pytest.approx(report["dense"]["seconds"] / report["factorised"]["seconds"])
