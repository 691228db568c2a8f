"""recipes/benchmarks/vq_quantizers.py: its table, going on after an interruption, and splits that share no photo."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.recipes import load

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "vq_quantizers.py"
SMALL = ["--steps", "3", "--num_train", "32", "--num_eval", "16", "--batch_size", "4", "--codebook_sizes", "16"]


@pytest.fixture(scope="module")
def benchmark():
    return load("vq_quantizers")


@pytest.mark.slow
def test_table_and_going_on(benchmark, tmp_path, capsys):
    command = [*SMALL, "--output_dir", str(tmp_path), "--seeds", "1"]
    methods = ["naive", "ours", "ours_fsq", "ours_fsq_paper_levels", "ours_lfq", "paper", "paper_no_remedies"]
    first = benchmark.main([*command, "--methods", *methods])
    assert [row["method"] for row in first] == methods
    assert all(0 < row["utilization"] <= 1 and row["psnr"] > 3 for row in first)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 9 and table[0].count("|") == table[2].count("|") == 7
    more = benchmark.main([*command, "--methods", "ours", "ours_cosine"])
    assert more[:7] == first and more[7]["method"] == "ours_cosine" and len(more) == 8
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"] == more
    for line in saved["summary"]:
        mine = [row["psnr"] for row in more if row["method"] == line["method"]]
        assert line["seeds"] == len(mine)
        assert line["psnr"]["mean"] == pytest.approx(sum(mine) / len(mine))
        assert line["psnr"]["half_range"] == pytest.approx((max(mine) - min(mine)) / 2)
    with pytest.raises(FileExistsError, match="steps 3, not 4"):
        benchmark.main([*command, "--steps", "4", "--methods", "ours"])
    with pytest.raises(ValueError, match="Unknown method"):
        benchmark.main([*command, "--methods", "theirs"])


def test_rows_of_a_seed_start_from_the_same_network(benchmark):
    args = benchmark.BenchmarkArguments(steps=0)
    images = torch.zeros(1, 3, 32, 32)
    first, second = (benchmark.train_one(method, 16, 5, args, images)[0] for method in ("ours", "naive"))
    for name, tensor in first.decoder.state_dict().items():
        assert torch.equal(tensor, second.decoder.state_dict()[name]), name


def test_splits_share_no_photo(benchmark, tmp_path):
    for number in range(7):
        Image.fromarray(np.full((40, 40, 3), 30 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    seen = {}
    for split in ("held_out", "tune"):
        args = benchmark.BenchmarkArguments(image_dir=str(tmp_path), split=split, scale=1.0)
        train, held = benchmark.load_data(args)
        seen["train"], seen[split] = set(train[:, 0, 0, 0].tolist()), set(held[:, 0, 0, 0].tolist())
    assert [len(seen[name]) for name in ("train", "tune", "held_out")] == [5, 1, 1]
    assert len(set.union(*seen.values())) == 7
    with pytest.raises(ValueError, match="held_out or tune"):
        benchmark.load_data(benchmark.BenchmarkArguments(split="test"))
