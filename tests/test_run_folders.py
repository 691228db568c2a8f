"""Output folders: what --overwrite may remove, what a resume goes on with, and what both refuse."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tokcom_hf import VQGANConfig, VQGANTrainingArguments
from tokcom_hf.fingerprints import fingerprint, settings_of
from tokcom_hf.run_folders import RunFolder, RunFolderArguments, check_output_dir


@dataclass
class Run(RunFolderArguments):
    train_file: str | None = field(default=None)
    seed: int = field(default=0)


def whole_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    step = folder.name.removeprefix("checkpoint-")
    state = {"global_step": int(step) if step.isdigit() else 3, "epoch": 0.5}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def started(path, settings=None, stages=("vae", "denoiser"), **options) -> RunFolder:
    folder = RunFolder(Run(str(path), **options), "train_x", stages, ("discriminator",))
    folder.start({stage: settings or {"training.learning_rate": 0.1} for stage in stages})
    return folder


def test_overwrite_removes_what_the_run_owns_and_nothing_of_others(tmp_path):
    out = tmp_path / "out"
    run = started(out)
    run.finish("vae")
    own = [
        whole_checkpoint(out / "checkpoint-3"), whole_checkpoint(out / "vae" / "checkpoint-3"), out / "results.json",
        out / "vae" / "results.json", out / "vae" / "tokenizer.json", out / "vae" / "model.safetensors",
    ]  # fmt: skip
    (out / "discriminator").mkdir()
    elsewhere = whole_checkpoint(tmp_path / "archive" / "checkpoint-9")
    others = [
        whole_checkpoint(out / "another_project" / "checkpoint-500"), whole_checkpoint(out / "vae" / "old" / "checkpoint-1"),
        whole_checkpoint(out / "checkpoint-best"), out / "notes.txt", out / "discriminator" / "notes.txt",
        out / "my_lora.safetensors",
    ]  # fmt: skip
    for path in own + others:
        if not path.exists():
            path.write_text("x")
    (out / "checkpoint-4").symlink_to(elsewhere, target_is_directory=True)

    again = RunFolder(Run(str(out), overwrite=True), "train_x", ("vae", "denoiser"), ("discriminator",))
    assert all(path.exists() for path in own + others)  # nothing goes before everything has been checked
    again.start({"vae": {}, "denoiser": {}})
    assert [path for path in own if path.exists()] == [] and not (out / "checkpoint-4").exists()
    assert [path for path in others if not path.exists()] == [] and (elsewhere / "model.safetensors").is_file()
    assert not again.is_finished("vae")
    # The run that was replaced is finished no more for a resume, either.
    assert not RunFolder(Run(str(out), resume=True), "train_x", ("vae", "denoiser")).is_finished("vae")


def test_a_folder_without_marker_loses_only_checkpoints_directly_in_it(tmp_path):
    whole_checkpoint(tmp_path / "checkpoint-3")
    other = whole_checkpoint(tmp_path / "another" / "checkpoint-3")
    (tmp_path / "README.md").write_text("mine")
    started(tmp_path, overwrite=True)
    assert not (tmp_path / "checkpoint-3").exists() and other.exists() and (tmp_path / "README.md").exists()
    foreign = tmp_path / "foreign"
    whole_checkpoint(foreign / "vae" / "checkpoint-3")
    with pytest.raises(FileExistsError, match=r"no run\.json"):
        started(foreign, overwrite=True)
    assert (foreign / "vae" / "checkpoint-3").is_dir()
    check_output_dir(tmp_path / "another", overwrite=True)
    assert not other.exists()


def test_the_folder_of_another_recipe_is_refused(tmp_path):
    started(tmp_path)
    for option in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"a run of train_x\.py, not of train_y\.py"):
            RunFolder(Run(str(tmp_path), **option), "train_y")


def test_one_rule_for_resuming(tmp_path):
    out = tmp_path / "out"
    run = started(out, stages=("",), resume=True)  # nothing there yet: the beginning
    assert run.checkpoint() is None
    # Killed before its first checkpoint: it can start again, with and without a flag.
    assert started(out, stages=("",)).checkpoint() is None
    assert started(out, stages=("",), resume_from_checkpoint="true").checkpoint() is None
    first, second = whole_checkpoint(out / "checkpoint-3"), whole_checkpoint(out / "checkpoint-12")
    with pytest.raises(FileExistsError, match="add --resume_from_checkpoint true"):
        started(out, stages=("",))
    assert started(out, stages=("",), resume_from_checkpoint="true").checkpoint() == str(second)
    assert started(out, stages=("",), resume_from_checkpoint=str(first)).checkpoint() == str(first)
    with pytest.raises(ValueError, match="there is no such folder"):
        started(out, stages=("",), resume_from_checkpoint=str(out / "checkpoint-4"))
    with pytest.raises(ValueError, match="give one of them"):
        started(out, stages=("",), resume=True, overwrite=True)
    # A newer one that is not whole is passed over; where none is whole there is nothing to go on from.
    (second / "optimizer.pt").write_bytes((second / "optimizer.pt").read_bytes()[:-9])
    assert started(out, stages=("",), resume=True).checkpoint() == str(first)
    with pytest.raises(ValueError, match=r"auxiliary\.pt is missing"):
        started(out, stages=("",), resume=True).checkpoint(["auxiliary.pt"])


def test_a_resume_with_other_settings_is_refused_and_a_new_folder_takes_them(tmp_path):
    out = tmp_path / "out"
    started(out).finish("vae")
    checkpoint = whole_checkpoint(out / "denoiser" / "checkpoint-3")
    (out / "vae").mkdir()
    (out / "vae" / "results.json").write_text("{}")
    told = r"training\.learning_rate 0\.1 -> 0\.2.*--overwrite.*--resume_from_checkpoint .* --output_dir"
    with pytest.raises(ValueError, match=told):
        started(out, {"training.learning_rate": 0.2}, resume=True)
    # Settings that only one release knows say nothing.
    assert started(out, {"training.learning_rate": 0.1, "training.new": 1}, resume=True).is_finished("vae")
    moved = started(tmp_path / "new", {"training.learning_rate": 0.2}, resume_from_checkpoint=str(checkpoint))
    assert moved.is_finished("vae") and (tmp_path / "new" / "vae" / "results.json").is_file()
    assert moved.checkpoint(stage="denoiser") == str(checkpoint) and not moved.is_finished("denoiser")
    with pytest.raises(FileExistsError, match="no checkpoint of the run in it"):
        started(tmp_path / "new", resume_from_checkpoint=str(checkpoint))


def test_going_on_from_an_earlier_stage_trains_the_later_ones_anew(tmp_path):
    run = started(tmp_path)
    run.finish("vae"), run.finish("denoiser")
    early = whole_checkpoint(tmp_path / "vae" / "checkpoint-3")
    late = whole_checkpoint(tmp_path / "denoiser" / "checkpoint-3")
    again = started(tmp_path, resume_from_checkpoint=str(early))
    assert not again.is_finished("vae") and not again.is_finished("denoiser") and not late.exists()
    assert again.checkpoint(stage="vae") == str(early) and again.checkpoint(stage="denoiser") is None


def test_a_given_stage_stays_when_the_one_behind_it_is_replaced(tmp_path):
    started(tmp_path, stages=("vae",)).finish("vae")
    vae = whole_checkpoint(tmp_path / "vae" / "checkpoint-3")
    options = {"recipe": "train_x", "stages": ("denoiser",), "given": ("vae",)}
    RunFolder(Run(str(tmp_path)), **options).start({"denoiser": {}})
    late = whole_checkpoint(tmp_path / "denoiser" / "checkpoint-3")
    with pytest.raises(FileExistsError, match=r"denoiser.* is not empty"):
        RunFolder(Run(str(tmp_path)), **options).start({"denoiser": {}})
    RunFolder(Run(str(tmp_path), overwrite=True), **options).start({"denoiser": {}})
    assert vae.exists() and not late.exists()
    assert json.loads((tmp_path / "run.json").read_text())["stages"]["vae"]["finished"]


def test_settings_hold_what_decides_and_data_count_by_content(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    sections = {"run": Run, "model": VQGANConfig, "text": LlamaConfig, "training": VQGANTrainingArguments}
    values = {name: {} for name in sections}
    values["run"] = {"train_file": str(text), "output_dir": "here", "resume": True}
    plain = settings_of(sections, values)
    assert plain["model.codebook_size"] == VQGANConfig().codebook_size and plain["text.hidden_size"] == 4096
    assert plain["training.perceptual_weight"] == 0.005 and plain["training.batch_size"] == 8
    shown = ("run.output_dir", "run.resume", "training.logging_steps", "training.output_dir", "training.num_pictures")
    assert not [name for name in shown if name in plain] and "model.transformers_version" not in plain
    # Elsewhere, looked at more often, in smaller parts, under another name: the same run.
    copy = tmp_path / "b.txt"
    copy.write_text("one")
    values["run"] = {"train_file": str(copy), "output_dir": "there", "overwrite": True}
    values["training"] = {"logging_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert settings_of(sections, values) == plain
    copy.write_text("two")
    values["training"]["learning_rate"] = 0.5
    changed = settings_of(sections, values)
    assert [name for name in plain if plain[name] != changed[name]] == ["run.train_file", "training.learning_rate"]
    (tmp_path / "photos").mkdir()
    before = fingerprint(str(tmp_path / "photos"))
    (tmp_path / "photos" / "1.png").write_bytes(b"x")
    assert fingerprint(str(tmp_path / "photos")) != before and fingerprint("user/name") == "user/name"


def test_a_model_folder_counts_by_what_is_loaded_from_it(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(str(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    whole_checkpoint(tmp_path / "checkpoint-3")
    assert fingerprint(str(tmp_path)) == before
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert fingerprint(str(tmp_path)) != before
    # Of a large file the beginning and the end are read.
    large = tmp_path / "model-00001-of-00002.safetensors"
    with large.open("wb") as file:
        file.truncate(65 << 20)
    before = fingerprint(str(tmp_path))
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint(str(tmp_path)) != before
