"""What a whole checkpoint is: every file there, readable, and as long as it says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tokcom_hf.checkpoints import (
    checkpoint_fault,
    checkpoints,
    choose_checkpoint,
    last_complete_checkpoint,
    last_finite_checkpoint,
    newest_state,
)


@pytest.fixture
def run(tmp_path):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.full((2,), float(step)), "bias": torch.zeros(3)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
            torch.save({"step": step}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 10}))
    return tmp_path


def test_the_newest_by_number_and_nothing_else_counts(run):
    (run / "checkpoint-99").write_text("a file")
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-1a", "other/checkpoint-50"):
        (run / name).mkdir(parents=True)
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-10", "checkpoint-2"]
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10") and newest_state(run)["epoch"] == 1.0
    assert last_complete_checkpoint(run / "nothing") is None and newest_state(run / "nothing") is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "trainer_state.json").write_text("{ tru"), "trainer_state.json cannot be read"),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), "does not say at which step"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "model.safetensors is cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"xx"), "cannot be read"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut short"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda folder: cut(folder / "rng_state_1.pth"), "rng_state_1.pth is cut short"),
        (lambda folder: [path.unlink() for path in folder.glob("rng*")], "rng_state.pth is missing"),
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
    ],
)
def test_harmed_checkpoints_are_passed_over_and_refused_by_name(run, harm, fault):
    newest = run / "checkpoint-10"
    assert checkpoint_fault(newest) is None
    harm(newest)
    assert fault in checkpoint_fault(newest)
    assert choose_checkpoint(run, True) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match="Training cannot go on from") as error:
        choose_checkpoint(run, str(newest))
    assert fault in str(error.value)


def test_shards_and_files_that_only_some_runs_need(run):
    newest = run / "checkpoint-10"
    assert checkpoint_fault(newest, ["ema.safetensors"]) == "ema.safetensors is missing"
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole \(checkpoint-10: auxiliary\.pt is missing"):
        choose_checkpoint(run, True, ["auxiliary.pt"])
    (newest / "model.safetensors").rename(newest / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (newest / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_fault(newest) == "model-00002-of-00002.safetensors is missing"
    shutil.copy(newest / "model-00001-of-00002.safetensors", newest / "model-00002-of-00002.safetensors")
    assert checkpoint_fault(newest) is None


def test_the_last_good_one_holds_no_nan(run):
    assert last_finite_checkpoint(run) == str(run / "checkpoint-10")
    save_file({"weight": torch.tensor([1.0, float("nan")])}, run / "checkpoint-10" / "model.safetensors")
    assert last_finite_checkpoint(run) == str(run / "checkpoint-2")
