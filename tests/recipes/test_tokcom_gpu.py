"""recipes/benchmarks/tokcom_gpu.py: says so without a GPU; its functions run on a CPU at toy size."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import load

PATH = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "tokcom_gpu.py"
WORDS = ["the", "quick", "brown", "fox", "dog", "jumps", "over", "lazy", "old", "house"]


@pytest.fixture(scope="module")
def benchmark():
    return load("tokcom_gpu")


def test_without_a_gpu_it_says_so_and_ends_well(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(PATH)])
    # A recipe that fails leaves with SystemExit.
    benchmark.run_recipe(benchmark.main)
    assert capsys.readouterr().out.strip() == "No GPU on this machine: nothing was measured."


def test_sizes_are_what_they_are_called(benchmark):
    for size, low, high in (("12M", 11.4e6, 12.6e6), ("110M", 104e6, 116e6), ("paper", 1.0e9, 1.4e9)):
        assert low < benchmark.build(size, 4097, "meta").num_parameters() < high, size


@pytest.mark.slow
def test_everything_runs_at_toy_size_on_a_cpu(benchmark, monkeypatch, tmp_path, capsys):
    draw = random.Random(0)
    text = "\n\n\n".join(" ".join(draw.choice(WORDS) for _ in range(400)) for _ in range(60))
    (tmp_path / "text.txt").write_text(text)
    options = ["--device", "cpu", "--sizes", "toy", "--train_size", "toy", "--train_seconds", 0, "--least_steps", 40,
               "--step_tokens", 512, "--text_file", tmp_path / "text.txt", "--output", tmp_path / "gpu.json",
               "--timed_steps", 1, "--tokens", 16, "--batch_sizes", 2, "--block_sizes", 1, 0, "--num_steps", 1, 2,
               "--vocab_size", 280, "--num_samples", 2, "--num_prefixes", 4]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(PATH), *map(str, options)])
    benchmark.main()
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    toy = result["throughput"]["toy"]
    assert all(toy[f"{name}, trained tokens/s"] > 0 for name in ("vae stage", "denoiser stage", "baseline"))
    assert toy["baseline_parameters"] == pytest.approx(toy["parameters"], rel=0.05)
    assert [(row["model"], row.get("block_size"), row.get("num_steps")) for row in toy["generation"]] == [
        ("baseline", None, None), ("TokCom", 1, 1), ("TokCom", 1, 2), ("TokCom", 0, 1), ("TokCom", 0, 2),
    ]  # fmt: skip
    assert all("speedup" in row for row in toy["generation"][1:]) and result["left_out"] == []
    training = result["training"]
    assert training["vae"]["last_loss"] < training["vae"]["first_loss"]
    assert training["denoiser"]["last_loss"] < training["denoiser"]["first_loss"]
    assert list(training["rows"]) == [
        "held-out text", "heads alone", "TokCom, noise removed", "TokCom, block 1", "TokCom, block 16",
    ]  # fmt: skip
    assert training["rows"]["TokCom, noise removed"]["distinct_rows"]["mean"] == 1
    assert "tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(PATH), "--sizes", "13M"])
    with pytest.raises(ValueError, match="No size 13M"):
        benchmark.main()
