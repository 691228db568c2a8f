"""Two ranks learn what one process learns from the same global batch: plain, resumed on the other number, sharded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import ROOT
from tests.helpers.rank_worker import FSDP_TRAINERS, SAVED, STEPS, TRAINERS
from tokcom_hf import PrunedVLM, TokComModel

pytestmark = pytest.mark.slow
# Adam turns the rounding noise of a gradient that is zero into steps: a bias before a normalisation has no other.
ROUNDING = {"vqgan_ema": 5e-3, "vqgan_lfq": 5e-3}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """What rank_worker.py leaves."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.helpers.rank_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(work: Path, run: str, name: str) -> dict:
    return torch.load(work / run / name / "told.pt")


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(("run", "world"), [("two", 2), ("one_to_two", 2), ("two_to_one", 1)])
def test_ranks_end_where_one_process_does(work, name, run, world):
    one, other = told(work, "one", name), told(work, run, name)
    assert (one["world"], other["world"]) == (1, world)
    assert len(one["losses"]) == STEPS and other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # Buffers too: codebook, its counts and averages, statistics of a quantizer, the second network's.
    assert other["apart"] == 0.0
    for key, value in one["states"].items():
        rounding = ROUNDING.get(name, 2e-5) if key.endswith("bias") else 2e-5
        torch.testing.assert_close(other["states"][key], value, atol=rounding, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("run", ["two", "two_to_one"])
def test_evaluations_on_ranks_are_those_of_one_process(work, name, run):
    one, other = told(work, "one", name)["metrics"], told(work, run, name)["metrics"]
    timed = ("runtime", "per_second")
    values = {key: value for key, value in one.items() if key.startswith("eval_") and not key.endswith(timed)}
    assert values and all(math.isfinite(value) for value in values.values())
    for key, value in values.items():
        assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("name", FSDP_TRAINERS)
@pytest.mark.parametrize("run", ["fsdp", "fsdp_again"])
def test_sharded_training_learns_and_saves_what_one_process_does(work, name, run):
    one, sharded = told(work, "one", name), told(work, run, name)
    assert sharded["world"] == 2 and sharded["class"].startswith("FSDP")
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for key, value in one["metrics"].items():
        if key.startswith("eval_") and not key.endswith(("runtime", "per_second")):
            assert sharded["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for folder in (Path(), Path(f"checkpoint-{STEPS}")):
        first, second = (load_file(work / at / name / folder / "model.safetensors") for at in ("one", run))
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize(("name", "kind"), [("denoiser", TokComModel), ("pruning", PrunedVLM)])
def test_a_sharded_run_leaves_folders_that_load(work, name, kind):
    for folder in (work / "fsdp" / name, work / "fsdp" / name / f"checkpoint-{SAVED}"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == [kind.__name__]
        assert not list(folder.glob("_fsdp*.py")), "torch's own files were copied"
        model = kind.from_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        found = model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in saved.items())
