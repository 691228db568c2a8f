"""Pushing a model folder to the hub on loopback: what is uploaded, where to, and what is refused."""

import os

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from loopback import Hub, User

from tokcom_hf import hub

FILES = [
    "config.json", "model.safetensors", "README.md", "vae/model.safetensors", "modeling_tokcom.py",
    "vae/checkpoint-3/optimizer.pt", "denoiser/checkpoint-9/model.safetensors", "denoiser/train_latents.npy",
    "training_args.bin", "checkpoint-3/model.safetensors", "run.json", "denoiser/run.json", "runs/events",
    "logs/training.log", "vae/logs/tensorboard/events",
]  # fmt: skip


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub, which this process takes for the Hub, logged in as `me`."""
    with Hub(tmp_path / "hub", {"hf_me": User("me"), "hf_reads": User("me", role="read")}) as server:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text %d" % number)
    return folder


def files(server: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    root = server.folder(name, revision)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_model_goes_up_and_the_run_stays(server, folder):
    commit = hub.push_folder(folder, "me/model")
    assert commit.startswith(f"{server.url}/me/model/") and server.repository("me/model").branches["main"] in commit
    pushed = files(server, "me/model")
    assert set(pushed) == {*FILES[:5], ".gitattributes"}
    assert all(pushed[name] == (folder / name).read_bytes() for name in FILES[:5])
    # Into a repository that exists, too, and to a private one where that is asked.
    (folder / "config.json").write_text("{}")
    hub.push_folder(folder, "me/model")
    assert files(server, "me/model")["config.json"] == b"{}"
    hub.push_folder(folder, "me/secret", private=True)
    assert server.repository("me/secret").private and not server.repository("me/model").private


def test_nothing_is_pushed_without_a_name_or_a_model_or_the_right(server, tmp_path, folder):
    with pytest.raises(ValueError, match="hub_model_id"):
        hub.push_folder(tmp_path, "")
    with pytest.raises(OSError, match=r"no config\.json"):
        hub.push_folder(tmp_path, "me/model")
    with pytest.raises(HfHubHTTPError) as error:
        hub.push_folder(folder, "me/model", token="hf_reads")
    assert error.value.response.status_code == 403
    assert not server.store.repositories


def test_recipes_take_the_hub_settings_from_the_trainer():
    section = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True, "learning_rate": 1e-3}
    assert hub.take_upload(section) == hub.Upload("me/model", private=True) and section == {"learning_rate": 1e-3}
    assert hub.take_upload({"hub_model_id": "me/model"}) is None
    with pytest.raises(ValueError, match="needs --hub_model_id"):
        hub.take_upload({"push_to_hub": True})
    with pytest.raises(ValueError, match="--hub_strategy all_checkpoints"):
        hub.take_upload({"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": "all_checkpoints"})


def test_a_revision_is_a_branch_of_its_own(server, folder):
    for _ in range(2):
        hub.Upload("me/model", revision="v1").push(folder, "-quantizer")
    assert set(files(server, "me/model-quantizer", "v1")) == {*FILES[:5], ".gitattributes"}
    assert set(files(server, "me/model-quantizer")) == {".gitattributes"}
