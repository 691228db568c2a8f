"""Pushing a model folder: what is uploaded, and what is refused."""

import pytest
from huggingface_hub.utils import filter_repo_objects

from tokcom_hf import hub


class FakeApi:
    calls: list = []

    def __init__(self, token=None):
        self.calls.clear()

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options["exist_ok"]))

    def upload_folder(self, folder_path, repo_id, ignore_patterns):
        self.calls.append(("upload", repo_id, ignore_patterns))
        return "https://hub/commit"


def test_the_model_goes_up_and_the_run_stays(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    assert hub.push_folder(tmp_path, "me/model") == "https://hub/commit"
    assert FakeApi.calls[0] == ("create", "me/model", True)
    patterns = FakeApi.calls[1][2]
    files = [
        "config.json", "model.safetensors", "README.md", "vae/model.safetensors", "modeling_tokcom.py",
        "vae/checkpoint-3/optimizer.pt", "denoiser/checkpoint-9/model.safetensors", "denoiser/train_latents.npy",
        "training_args.bin",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, ignore_patterns=patterns)) == files[:5]


def test_nothing_is_pushed_without_a_name_or_a_model(tmp_path):
    with pytest.raises(ValueError, match="hub_model_id"):
        hub.push_folder(tmp_path, "")
    with pytest.raises(OSError, match=r"no config\.json"):
        hub.push_folder(tmp_path, "me/model")


def test_recipes_take_the_hub_settings_from_the_trainer():
    section = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True, "learning_rate": 1e-3}
    assert hub.take_upload(section) == hub.Upload("me/model", private=True) and section == {"learning_rate": 1e-3}
    assert hub.take_upload({"hub_model_id": "me/model"}) is None
    with pytest.raises(ValueError, match="needs --hub_model_id"):
        hub.take_upload({"push_to_hub": True})
    with pytest.raises(ValueError, match="--hub_strategy all_checkpoints"):
        hub.take_upload({"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": "all_checkpoints"})


def test_a_revision_is_a_branch_of_its_own(tmp_path, monkeypatch):
    class BranchingApi(FakeApi):
        def create_branch(self, repo_id, branch, exist_ok):
            self.calls.append(("branch", repo_id, branch))

        def upload_folder(self, revision, **options):
            self.calls.append(("revision", revision))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "HfApi", BranchingApi)
    hub.Upload("me/model", revision="v1").push(tmp_path, "-quantizer")
    assert BranchingApi.calls[1:] == [("branch", "me/model-quantizer", "v1"), ("revision", "v1")]
