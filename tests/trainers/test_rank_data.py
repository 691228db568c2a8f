"""Two ranks: last batches that do not come out even, fewer rows than ranks, streams, and a rank that dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import ROOT

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[dict, dict, dict]:
    """What rank_data.py leaves: one process, rank 0 and rank 1."""
    work: Path = tmp_path_factory.mktemp("rank_data")
    command = [sys.executable, "-m", "tests.helpers.rank_data", str(work)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(torch.load(work / name) for name in ("told.pt", "told-0.pt", "told-1.pt"))


def test_an_uneven_last_batch_is_filled_up_from_the_first_rows(told):
    one, first, second = (part["uneven"] for part in told)
    assert one["steps"] == first["steps"] == second["steps"] == 6  # 22 rows, 8 a step, twice
    assert [len(rows) for rows in first["seen"]] == [len(rows) for rows in second["seen"]] == [4] * 6
    assert first["losses"] == second["losses"] and first["apart"] == 0.0
    # Whole batches are those of one process.
    assert first["losses"][:2] == pytest.approx(one["losses"][:2], rel=1e-5)


def test_with_drop_last_two_ranks_are_one_process(told):
    one, first, _ = (part["dropped"] for part in told)
    assert one["steps"] == first["steps"] == 4 and first["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_fewer_rows_than_ranks_train_on_repeated_rows(told):
    _, first, second = (part["one_row"] for part in told)
    assert first["steps"] == second["steps"] == 2 and first["apart"] == 0.0
    assert {row for rows in (*first["seen"], *second["seen"]) for row in rows} == {first["seen"][0][0]}


def test_data_without_a_whole_batch_are_refused_before_the_first_step(told):
    for part in told:
        assert "dataloader_drop_last" in part["none"] and "no batch" in part["none"]


def test_ranks_read_a_stream_without_overlap_and_resume_at_its_place(told):
    one, first, second = (part["stream"] for part in told)
    assert len(first["seen"]) == len(second["seen"]) == 5
    for whole, left, right in zip(one["seen"], first["seen"], second["seen"]):
        assert not set(left) & set(right) and sorted(left + right) == sorted(whole)
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for part in told:
        assert part["stream_again"]["seen"] == part["stream"]["seen"][2:]
        assert part["stream_again"]["losses"][-3:] == part["stream"]["losses"][2:]


def test_a_killed_rank_ends_the_others_within_a_minute(tmp_path):
    config = ROOT / "recipes" / "configs" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "tests.helpers.rank_data", "--killed", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    _, told = process.communicate(timeout=400)
    ended = time.time()
    assert process.returncode != 0 and "exitcode  : -9" in told
    steps = max(path.stat().st_mtime for path in (tmp_path / "logs").iterdir())
    assert ended - steps < 60, f"the other rank outlived the killed one by {ended - steps:.0f} s"
    left = [item for item in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _text(item)]
    assert left == []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""
