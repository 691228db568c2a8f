"""A run that is killed, whose disk is full, read-only or gone, or whose numbers leave the finite ones: what it leaves, and
that it ends bit for bit as the undisturbed one when it goes on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokcom_hf.checkpoints import checkpoint_fault

ROOT = Path(__file__).parents[1]
FINAL = ("model.safetensors", "config.json", "generation_config.json")
STATE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "ema.safetensors", "auxiliary.pt", "rng_state.pth")

# Before the first checkpoint, inside and at the end of some, inside the final save, and before `run.json` says finished.
KILLS = [
    *(("fsync", number) for number in (1, 5, 19, 31)),
    *(("rename", number) for number in (1, 3)),
    *(("replace", number) for number in (1, 3, 5, 6)),
]
NUMBERS = {
    "poison_weight": "The loss became nan",
    "poison_moment": r"optimizer: state\.0\.exp_avg_sq",
    "poison_average": r"average of module\.model\.embed_tokens\.weight",
    "poison_second": "second: weight",
    "poison_second_moment": r"second_optimizer: state\.0\.exp_avg",
}
# What is done to the disk, and what is told.
DISK = {
    "limit": "File too large while writing '{folder}/checkpoint-4'",
    "put_file": "File exists while writing '{folder}/checkpoint-4'",
    "fill_disk": "No space left on device while writing '{folder}/",
    "make_read_only": "Read-only file system while writing '{folder}/",
}
MOUNTED = ("fill_disk", "make_read_only")
GONE = ("remove_folder", "replace_folder")


def run_jobs(folder: Path, jobs: list[dict]) -> list[dict]:
    """One process for all jobs: each is a fork of it, so that torch is imported once."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.helpers.small_run", str(folder), str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 8 MB, or None where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, disk):
    """Folder of all runs, and (exit code, stderr) of each by its name: `NAME`, and `NAME again` for the one that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict] = [{"name": "whole"}]
    for call, number in KILLS:
        jobs += [{"name": f"{call}-{number}", "kill": [call, number]}, {"name": f"{call}-{number}", "resume": True}]
    jobs += [{"name": name, "fault": name} for name in (*NUMBERS, *DISK, *GONE) if name not in MOUNTED]
    if disk is not None:
        right = [["mount", "-o", "remount,rw", str(disk)], ["rm", "-f", str(disk / "filler")]]
        for name in MOUNTED:
            (folder / name).symlink_to(disk / name)
            jobs += [{"name": name, "place": str(disk), "fault": name}]
            jobs += [{"name": name, "place": str(disk), "resume": True, "before": right}]
    jobs += [{"name": "at end", "fault_at_end": "limit"}, {"name": "at end", "resume": True}]
    jobs += [{"name": "damaged"}, {"name": "damaged", "resume": True, "damage": "checkpoint-6/optimizer.pt"}]
    results: dict[str, dict] = {}
    for job, result in zip(jobs, run_jobs(folder, jobs)):
        results[f"{job['name']} again" if job.get("resume") else job["name"]] = result
    return folder, results


def ends_as_the_undisturbed_one(folder: Path, name: str) -> None:
    whole, run = folder / "whole", folder / name
    for file in FINAL:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), (name, file)
    for file in STATE:
        same = (run / "checkpoint-6" / file).read_bytes() == (whole / "checkpoint-6" / file).read_bytes()
        assert same, (name, file)
    assert all(checkpoint_fault(checkpoint) is None for checkpoint in run.glob("checkpoint-*")), name
    assert json.loads((run / "run.json").read_text())["stages"][""]["finished"] is True, name
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir()), name


def told(result: dict) -> str:
    """The one line that the run ends with."""
    lines = [line for line in result["stderr"].splitlines() if line and "Writing model shards" not in line]
    assert "Traceback" not in result["stderr"] and lines[-1].startswith("error: "), result["stderr"][-2000:]
    return lines[-1]


def test_the_undisturbed_run(runs):
    folder, results = runs
    assert results["whole"]["code"] == 0
    ends_as_the_undisturbed_one(folder, "whole")
    manifest = json.loads((folder / "whole" / "checkpoint-6" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["settings"]) == (6, 1, {"training.seed": 0})
    assert set(STATE) | {"trainer_state.json", "training_args.bin", "config.json"} <= set(manifest["files"])


@pytest.mark.parametrize(("call", "number"), KILLS)
def test_a_killed_run_goes_on_to_the_same_end(runs, call, number):
    folder, results = runs
    name = f"{call}-{number}"
    assert results[name]["code"] == -9
    assert results[f"{name} again"]["code"] == 0, results[f"{name} again"]["stderr"][-2000:]
    assert "passed over" not in results[f"{name} again"]["stderr"]  # nothing half-written had a checkpoint's name
    ends_as_the_undisturbed_one(folder, name)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite_end_the_run_with_step_cause_and_checkpoint(runs, name):
    folder, results = runs
    assert results[name]["code"] == 1
    line = told(results[name])
    assert re.search(NUMBERS[name], line), line
    assert f"at step 4; the last verified checkpoint is {folder / name / 'checkpoint-2'}." in line
    assert [path.name for path in (folder / name).glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.parametrize("name", DISK)
def test_what_the_disk_refuses_is_one_sentence_and_leaves_the_checkpoints_before(runs, disk, name):
    folder, results = runs
    if name in MOUNTED and disk is None:
        pytest.skip("this user may not mount a small tmpfs")
    assert results[name]["code"] == 1
    place = (disk if name in MOUNTED else folder) / name
    assert DISK[name].format(folder=place) in told(results[name])
    assert "--resume_from_checkpoint true" in told(results[name])
    assert checkpoint_fault(place / "checkpoint-2") is None
    assert not list(place.glob(".unfinished*"))
    if name in MOUNTED:
        assert results[f"{name} again"]["code"] == 0
        ends_as_the_undisturbed_one(folder, name)


@pytest.mark.parametrize("name", GONE)
def test_a_folder_that_is_gone_is_not_made_anew(runs, name):
    folder, results = runs
    assert results[name]["code"] == 1
    assert f"The folder '{folder / name}' was removed or replaced while a run was writing into it" in told(
        results[name]
    )
    assert not (folder / name).exists() or not any((folder / name).iterdir())


def test_a_final_save_that_the_disk_refuses_is_done_again(runs):
    folder, results = runs
    assert results["at end"]["code"] == 1 and f"while writing '{folder / 'at end'}'" in told(results["at end"])
    assert results["at end again"]["code"] == 0
    ends_as_the_undisturbed_one(folder, "at end")


def test_a_damaged_newest_checkpoint_is_passed_over_by_name_and_written_again(runs):
    folder, results = runs
    assert results["damaged again"]["code"] == 0
    assert "damaged/checkpoint-6 is passed over: optimizer.pt has 7 bytes" in results["damaged again"]["stderr"]
    ends_as_the_undisturbed_one(folder, "damaged")
