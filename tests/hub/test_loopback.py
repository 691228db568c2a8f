"""The hub on loopback through `huggingface_hub`'s own client: what the Hub does, it does, errors included."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback import Hub, User

TOKENS = {
    "hf_ada": User("ada", organizations=("lab",)),
    "hf_ada_reads": User("ada", role="read"),
    "hf_bob": User("bob"),
}
LARGE = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), dict(TOKENS), part_size=400_000) as hub:
        yield hub


@pytest.fixture
def client(hub, monkeypatch):
    """`client(token)` is an HfApi of that user. Offline mode and Xet, which CI sets, are off for the test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == "HF_TOKEN"]:
        monkeypatch.delenv(name)
    return lambda token=False: HfApi(endpoint=hub.url, token=token)


@pytest.fixture
def ada(client):
    return client("hf_ada")


def commit(api, name, message="more", **contents):
    operations = [CommitOperationAdd(path.replace("__", "/"), value) for path, value in contents.items()]
    return api.create_commit(name, operations, commit_message=message)


def test_who_a_token_is(client, ada):
    assert ada.whoami()["name"] == "ada" and ada.whoami()["orgs"][0]["name"] == "lab"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        client("hf_nobody").whoami(token="hf_nobody")


def test_creating_moving_and_deleting_a_repository(client, ada, hub):
    assert ada.create_repo("ada/first").repo_id == "ada/first"
    assert ada.create_repo("second").repo_id == "ada/second"
    assert ada.create_repo("lab/third", private=True).repo_id == "lab/third"
    assert hub.repository("lab/third").private and not hub.repository("ada/first").private
    ada.create_repo("ada/first", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        ada.create_repo("ada/first")
    assert error.value.response.status_code == 409
    ada.move_repo("ada/second", "ada/moved")
    assert ada.repo_exists("ada/moved") and not ada.repo_exists("ada/second")
    ada.delete_repo("ada/moved")
    assert not ada.repo_exists("ada/moved")


def test_who_may_write(client, ada):
    ada.create_repo("ada/own")
    for token, status in (("hf_bob", 403), ("hf_ada_reads", 403), (False, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            client(token).create_repo("ada/other")
        assert error.value.response.status_code == status
        with pytest.raises(HfHubHTTPError) as error:
            commit(client(token), "ada/own", a=b"1")
        assert error.value.response.status_code == status
    assert ada.list_repo_files("ada/own") == [".gitattributes"]


def test_commits_small_and_large_files_and_history(ada, hub, tmp_path):
    ada.create_repo("ada/files")
    made = commit(ada, "ada/files", "first", **{"config.json": b"{}", "model.safetensors": LARGE, "base__x.txt": b"x"})
    assert sorted(ada.list_repo_files("ada/files")) == [
        ".gitattributes",
        "base/x.txt",
        "config.json",
        "model.safetensors",
    ]
    info = ada.model_info("ada/files", files_metadata=False)
    assert info.sha == made.oid and made.commit_url == f"{hub.url}/ada/files/commit/{made.oid}"
    tree = {entry.path: entry for entry in ada.list_repo_tree("ada/files", recursive=True)}
    assert tree["model.safetensors"].lfs.size == len(LARGE) and tree["config.json"].lfs is None and "base" in tree
    assert [entry.path for entry in ada.list_repo_tree("ada/files", "base")] == ["base/x.txt"]
    assert ada.get_paths_info("ada/files", ["config.json", "nothing"])[0].size == 2
    # A large file arrived in parts of 400 kB, in order.
    puts = [asked for asked in hub.requests if asked.method == "PUT"]
    assert len(puts) == 3 and (hub.folder("ada/files") / "model.safetensors").read_bytes() == LARGE
    # The same content is not sent again, and a commit that changes nothing is none.
    again = commit(ada, "ada/files", **{"copy.safetensors": LARGE, "config.json": b"{}"})
    assert len([asked for asked in hub.requests if asked.method == "PUT"]) == 3
    assert commit(ada, "ada/files", **{"config.json": b"{}"}).oid == again.oid
    ada.create_commit("ada/files", [CommitOperationDelete("base/")], commit_message="less")
    assert "base/x.txt" not in ada.list_repo_files("ada/files")
    assert [one.title for one in ada.list_repo_commits("ada/files")] == ["less", "more", "first", "initial commit"]
    with pytest.raises(HfHubHTTPError) as error:
        ada.create_commit(
            "ada/files", [CommitOperationDelete("config.json")], commit_message="x", parent_commit=made.oid
        )
    assert error.value.response.status_code == 412


def test_a_small_file_over_the_wrong_way_and_a_bad_card_are_refused(ada):
    ada.create_repo("ada/bad")
    with pytest.raises(ValueError, match="mapping"):
        commit(ada, "ada/bad", **{"README.md": b"---\n- a list\n---\ntext"})
    with pytest.raises(ValueError, match=r"Invalid `path_in_repo`"):
        commit(ada, "ada/bad", **{"..__outside": b"x"})
    assert ada.list_repo_files("ada/bad") == [".gitattributes"]


def test_branches_tags_and_revisions(ada, tmp_path):
    ada.create_repo("ada/revisions")
    old = commit(ada, "ada/revisions", **{"a.txt": b"old"})
    ada.create_tag("ada/revisions", tag="v1")
    ada.create_branch("ada/revisions", branch="feature/x")
    with pytest.raises(HfHubHTTPError):
        ada.create_branch("ada/revisions", branch="feature/x")
    ada.create_branch("ada/revisions", branch="feature/x", exist_ok=True)
    new = commit(ada, "ada/revisions", **{"a.txt": b"new"})

    def read(revision):
        path = ada.hf_hub_download("ada/revisions", "a.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).parent.name == (new.oid if revision in (None, "main", new.oid) else old.oid)
        return Path(path).read_bytes()

    assert [read(name) for name in (None, "main", new.oid)] == [b"new"] * 3
    assert [read(name) for name in ("v1", "feature/x", old.oid)] == [b"old"] * 3
    refs = ada.list_repo_refs("ada/revisions")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": new.oid, "feature/x": old.oid}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", old.oid)]
    ada.delete_tag("ada/revisions", tag="v1")
    ada.delete_branch("ada/revisions", branch="feature/x")
    for missing in ("v1", "feature/x", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            ada.hf_hub_download("ada/revisions", "a.txt", revision=missing, cache_dir=tmp_path / "empty")


def test_private_and_gated_repositories_and_what_is_missing(client, ada, tmp_path):
    ada.create_repo("ada/secret", private=True)
    commit(ada, "ada/secret", **{"a.txt": b"secret"})

    def read(token, name="ada/secret", file="a.txt"):
        folder = tmp_path / f"cache_{token}"
        return Path(client(token).hf_hub_download(name, file, cache_dir=folder)).read_bytes()

    assert read("hf_ada") == read("hf_ada_reads") == b"secret"
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            read(token)
        assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            client(token).model_info("ada/secret")
    with pytest.raises(EntryNotFoundError):
        read("hf_ada", file="b.txt")
    with pytest.raises(RepositoryNotFoundError):
        read("hf_ada", "ada/nowhere")
    with pytest.raises(HfHubHTTPError) as error:
        read("hf_nobody")
    assert error.value.response.status_code == 401
    ada.update_repo_settings("ada/secret", private=False, gated="auto")
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(GatedRepoError) as error:
            read(token)
        assert error.value.response.status_code == status
    assert client("hf_bob").model_info("ada/secret").gated == "auto"


@pytest.mark.parametrize("large", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped(ada, hub, tmp_path, monkeypatch, large):
    # The client keeps whole pieces of 10 MB only, and waits a second before it goes on.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**15)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    name, content = ("model.safetensors", LARGE) if large else ("notes.txt", b"long text " * 30_000)
    ada.create_repo("ada/interrupted", exist_ok=True)
    commit(ada, "ada/interrupted", **{name: content})
    hub.requests.clear()
    hub.interrupt(name, after=100_000, times=2)
    path = ada.hf_hub_download("ada/interrupted", name, cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    ranges = [asked.range for asked in hub.requests if asked.method == "GET" and asked.range]
    assert len(ranges) >= 2 and all(int(asked.removeprefix("bytes=").split("-")[0]) > 0 for asked in ranges)
    assert len({asked for asked in ranges}) == 2  # the second part ended early, too, and the third began behind it


def test_a_snapshot_and_a_range_behind_the_end(client, ada, hub, tmp_path):
    ada.create_repo("ada/snapshot")
    commit(ada, "ada/snapshot", **{"a.txt": b"a", "base__model.safetensors": LARGE})
    folder = Path(ada.snapshot_download("ada/snapshot", cache_dir=tmp_path))
    assert (folder / "base" / "model.safetensors").read_bytes() == LARGE and (folder / "a.txt").read_bytes() == b"a"
    reply = huggingface_hub.utils.get_session().get(
        f"{hub.url}/ada/snapshot/resolve/main/a.txt", headers={"Range": "bytes=7-"}
    )
    assert reply.status_code == 416 and reply.headers["Content-Range"] == "bytes */1"


def test_a_process_gets_everything_from_its_environment_and_never_leaves_loopback(ada, hub, tmp_path):
    ada.create_repo("ada/process", private=True)
    commit(ada, "ada/process", **{"a.txt": b"a"})
    script = tmp_path / "script.py"
    script.write_text(
        "import socket, urllib.request\n"
        "from huggingface_hub import hf_hub_download, HfApi\n"
        "print(open(hf_hub_download('ada/process', 'a.txt')).read(), HfApi().whoami()['name'])\n"
        "for address in ('http://192.0.2.1', 'http://somewhere.invalid'):\n"
        "    try:\n"
        "        urllib.request.urlopen(address, timeout=1)\n"
        "    except OSError as error:\n"
        "        print('leave loopback' in str(error))\n"
    )
    command = [sys.executable, str(Path(__file__).parent / "loopback" / "guard.py"), str(script)]
    done = subprocess.run(command, env=hub.environment("hf_ada"), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["a", "ada", "True", "True"], done.stderr
