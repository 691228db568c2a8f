"""Every recipe with `--push_to_hub`, run against the hub on loopback, and what it pushed loaded without the package."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
from fetch_recipes import REPOSITORIES
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from loopback import Hub, User
from processes import run_on_hub
from push_recipes import COMMANDS

from tokcom_hf.hub import RUN_FILES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub after all pushes, the folder of the runs, what they left, and what another machine made of it."""
    work = tmp_path_factory.mktemp("recipes")
    with Hub(work / "hub", {"hf_ada": User("ada")}) as hub:
        run_on_hub(hub, work / "here", "push_recipes.py", work)
        run_on_hub(hub, work / "there", "fetch_recipes.py", work, package=False)
        left = json.loads((work / "recipes.json").read_text(encoding="utf-8"))
        yield hub, work, left, torch.load(work / "fetched.pt", weights_only=False)


def test_no_recipe_that_pushes_is_left_out():
    pushing = {path.stem for path in (ROOT / "recipes").glob("*.py") if "take_upload(" in path.read_text("utf-8")}
    assert pushing == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_pushed_folder_is_the_local_one_card_included(pushed, name):
    hub, work, left, _ = pushed
    folder, *_ = REPOSITORIES[name]
    assert "error" not in left[folder.split("/")[0]], left[folder.split("/")[0]]["error"]
    local, remote = work / folder, hub.folder(f"ada/{name}")
    files = [str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()]
    theirs = {str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()} - {".gitattributes"}
    # Checkpoints, caches and the trainer's own settings are the run's.
    assert theirs == set(filter_repo_objects(files, ignore_patterns=RUN_FILES)) >= {"README.md", "config.json"}
    assert all(filecmp.cmp(local / path, remote / path, shallow=False) for path in theirs)
    card = ModelCard.load(remote / "README.md")
    assert "tokcom_hf" in card.data.tags and "More information needed" not in card.content
    assert f"ada/{name}" in card.content, "what the card tells a reader to load is the repository"
    assert len(hub.repository(f"ada/{name}").history("main")) == 2, "one commit after the first"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
def test_another_machine_loads_it_without_the_package(pushed, name):
    *_, fetched = pushed
    _, auto_classes, tasks = REPOSITORIES[name]
    assert "error" not in fetched[name], fetched[name]["error"]
    assert set(fetched[name]) == {*auto_classes, *tasks, "weights"} and fetched[name]["weights"] > 0
