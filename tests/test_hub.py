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
