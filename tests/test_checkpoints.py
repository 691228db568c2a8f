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
from tokcom_hf.manifests import write_manifest


def written(tmp_path, manifest=False):
    """A run with two checkpoints of two ranks, without manifests as older releases left them, or with."""
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"weight": torch.full((2,), float(step)), "bias": torch.zeros(3)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
            torch.save({"step": step}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 10}))
        if manifest:
            write_manifest(folder, step=step, world_size=2, resumable=True, settings={"training.seed": 1})
    return tmp_path


@pytest.fixture
def run(tmp_path):
    return written(tmp_path)


@pytest.fixture
def listed(tmp_path):
    return written(tmp_path, manifest=True)


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


# What can be done to each file of a checkpoint, with what then is told. `other` is the run's checkpoint before it.
DAMAGE = {
    "missing": lambda file, other: file.unlink(),
    "emptied": lambda file, other: file.write_bytes(b""),
    "cut short": lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"\n"),
    "one bit": lambda file, other: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "swapped": lambda file, other: shutil.copy2(other / file.name, file),
    "a folder": lambda file, other: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_manifest_tells_every_damage_of_every_file(tmp_path, damage):
    names = {path.name for path in (written(tmp_path / "whole", manifest=True) / "checkpoint-10").iterdir()}
    assert len(names) == 7
    for name in sorted(names):
        run = written(tmp_path / name, manifest=True)
        newest = run / "checkpoint-10"
        assert choose_checkpoint(run, True) == str(newest)
        DAMAGE[damage](newest / name, run / "checkpoint-2")
        if (name, damage) == ("manifest.json", "missing"):
            # The rest is whole, as checkpoints were before there were manifests.
            assert choose_checkpoint(run, True) == str(newest)
            continue
        fault = checkpoint_fault(newest)
        assert fault is not None and (name in fault or "saved at step 2" in fault), (name, fault)
        assert choose_checkpoint(run, True) == str(run / "checkpoint-2")
        with pytest.raises(ValueError, match="Training cannot go on from"):
            choose_checkpoint(run, str(newest))


def test_same_size_and_other_content_is_told(listed):
    ours, other = listed / "checkpoint-10" / "model.safetensors", listed / "checkpoint-2" / "model.safetensors"
    assert ours.stat().st_size == other.stat().st_size
    shutil.copy2(other, ours)
    assert "model.safetensors does not hold what was written" in checkpoint_fault(listed / "checkpoint-10")


def test_what_does_not_belong_to_a_checkpoint_is_told_where_it_would_be_read(listed):
    newest = listed / "checkpoint-10"
    (newest / "notes.txt").write_text("mine")
    assert checkpoint_fault(newest) is None
    for name in ("adapter_model.safetensors", "pytorch_model.bin", "rng_state_2.pth", "auxiliary.pt"):
        shutil.copy(newest / "scheduler.pt", newest / name)
        assert checkpoint_fault(newest) == f"{name} is not of this checkpoint"
        (newest / name).unlink()


def test_a_renamed_checkpoint_is_another_step_s(listed):
    (listed / "checkpoint-10").rename(listed / "checkpoint-30")
    assert checkpoint_fault(listed / "checkpoint-30") == "it was saved at step 10"
    assert choose_checkpoint(listed, True) == str(listed / "checkpoint-2")


def test_another_run_s_checkpoint_is_passed_over(listed):
    same, other = {"training.seed": 1, "new": 3}, {"training.seed": 4}
    assert choose_checkpoint(listed, True, settings=same) == str(listed / "checkpoint-10")
    assert "another run saved it, with other data or settings: training.seed 1 -> 4" in checkpoint_fault(
        listed / "checkpoint-10", settings=other
    )
    with pytest.raises(ValueError, match=r"training\.seed 1 -> 4"):
        choose_checkpoint(listed, True, settings=other)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: "[]", "lists no files"),
        (lambda text: '{"files": 3}', "lists no files"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, and this release reads 1"),
        (lambda text: text.replace('"world_size": 2', '"world_size": 1'), "was changed after it was written"),
        (lambda text: text[:-1], "was changed after it was written"),
    ],
)
def test_a_manifest_that_was_changed_is_told(listed, change, fault):
    file = listed / "checkpoint-10" / "manifest.json"
    file.write_text(change(file.read_text()))
    assert checkpoint_fault(listed / "checkpoint-10") == f"manifest.json {fault}"


def test_weights_alone_are_not_gone_on_from(listed):
    newest = listed / "checkpoint-10"
    write_manifest(newest, step=10, world_size=2, resumable=False, settings=None)
    assert checkpoint_fault(newest) == "it holds weights only (save_only_model)"


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


def test_going_on_without_a_manifest_is_told(run, caplog):
    assert choose_checkpoint(run, True) == str(run / "checkpoint-10")
    assert choose_checkpoint(None, str(run / "checkpoint-2")) == str(run / "checkpoint-2")
    assert [record.getMessage().split(" has no manifest.json")[0] for record in caplog.records] == [
        str(run / "checkpoint-10"), str(run / "checkpoint-2"),
    ]  # fmt: skip
