"""Every model pushed to the hub on loopback, and loaded from there by name and revision without the package."""

import filecmp
from pathlib import Path

import pytest
import torch
from loopback import Hub, User
from parts import use_part
from processes import run_on_hub
from rows import ROWS, difference, slug


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub after all pushes, what was pushed, and what another machine made of it."""
    work = tmp_path_factory.mktemp("push")
    with Hub(work / "hub", {"hf_ada": User("ada")}) as hub:
        run_on_hub(hub, work / "here", "push_models.py", work)
        run_on_hub(hub, work / "there", "fetch_models.py", work / "fetched.pt", package=False)
        yield hub, *(torch.load(work / name, weights_only=False) for name in ("pushed.pt", "fetched.pt"))


def same_files(local: Path, remote: Path, left: tuple[str, ...] = ()) -> None:
    """Byte for byte; `.gitattributes` is the hub's own."""
    ours = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    theirs = {str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()}
    assert theirs - {".gitattributes"} == {path for path in ours if not path.startswith(left)}
    assert all(filecmp.cmp(local / path, remote / path, shallow=False) for path in theirs - {".gitattributes"})


def both(pushed, row):
    _, sent, fetched = pushed
    for found in (sent[row.name], fetched[row.name]):
        assert "error" not in found, found["error"]
    return sent[row.name], fetched[row.name]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_pushed_folder_is_the_local_one(pushed, row):
    hub, sent, _ = pushed
    assert "error" not in sent[row.name], sent[row.name]["error"]
    told, name = sent[row.name], f"ada/{slug(row.name)}"
    same_files(Path(told["folder"]), hub.folder(f"{name}-folder"), left=("checkpoint-3",))
    assert f"# {row.name}, “tiny”" in (hub.folder(f"{name}-folder") / "README.md").read_text(encoding="utf-8")
    assert told["commit"].startswith(f"{hub.url}/{name}-folder/") and told["commit"].endswith(
        hub.repository(f"{name}-folder").branches["main"]
    )
    # save_pretrained(..., push_to_hub=True): all that it writes, whichever part it writes last.
    remote, local = hub.folder(name), Path(told["second"])
    for path in [path for path in local.rglob("*") if path.is_file()]:
        assert filecmp.cmp(path, remote / path.relative_to(local), shallow=False), path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_another_machine_loads_the_wanted_revision_without_the_package(pushed, row):
    sent, fetched = both(pushed, row)
    assert difference(sent["v1"], fetched["v1"]) == 0 and difference(sent["main"], fetched["main"]) == 0
    assert difference(sent["v1"], sent["main"]) > 0
    for part in row.parts:
        assert difference(use_part(row.make_part(row.build())), fetched[part]) == 0
    if row.composite:
        assert difference(sent["reference"]["outputs"], fetched["reference"]) == 0


@pytest.mark.parametrize("row", [row for row in ROWS if row.tasks], ids=lambda row: row.name)
def test_pipelines_of_a_name_do_what_those_of_a_folder_do(pushed, row):
    sent, fetched = both(pushed, row)
    assert set(fetched["pipelines"]) == set(row.tasks)
    assert fetched["pipelines"] == sent["pipelines"] and all(sent["pipelines"].values())


def test_nothing_was_asked_of_anyone_but_the_hub_and_nothing_failed_there(pushed):
    hub, *_ = pushed
    wrong = [asked for asked in hub.requests if asked.status >= 500 or asked.status in (0, 400, 401, 403)]
    assert not wrong, wrong[:5]
    assert len(hub.requests) > 500
