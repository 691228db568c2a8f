"""Repositories of the hub on loopback: every commit is a folder, every file in it a link to its content.

`root/objects/<sha256>` holds each content once; `root/<type>s/<user>/<name>/<commit>/` holds the files of a commit under
their names. A branch or a tag is the name of a commit.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

COMMIT = re.compile(r"^[0-9a-f]{40}$")
# What a new repository's .gitattributes declares as large, in short; binary content is large too, as on the Hub.
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npy", ".npz", ".onnx", ".pkl", ".h5", ".parquet", ".zip")
LARGE_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()


class HubError(Exception):
    """A refusal: HTTP status, the Hub's error code (header `X-Error-Code`) or None, and the message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.body = status, message, code, headers or {}, body


def git_blob_id(content: bytes) -> str:
    """SHA-1 that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE or b"\0" in sample


@dataclass
class File:
    """A file of a commit: `oid` is git's blob id, that of the pointer where the file is large (LFS)."""

    path: str
    size: int
    sha256: str
    oid: str
    large: bool

    def entry(self) -> dict:
        """As the tree endpoint lists it."""
        listed = {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}
        if self.large:
            listed["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return listed


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    parent: str | None
    files: dict[str, File] = field(default_factory=dict)


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a (shortened) commit id.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((one for one in self.commits if one.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit, found = self.find(revision), []
        while True:
            found.append(commit)
            if commit.parent is None:
                return found
            commit = self.commits[commit.parent]


class Store:
    """All repositories below a folder."""

    def __init__(self, root: Path):
        self.root = Path(root)
        (self.root / "objects").mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}

    # ------------------------------------------------------------------ contents
    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256

    def keep(self, content: bytes) -> str:
        """Stores a content under its SHA-256, which is returned."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.object_path(sha256)
        if not path.exists():
            temporary = path.with_suffix(f".{os.urandom(4).hex()}")
            temporary.write_bytes(content)
            temporary.replace(path)
        return sha256

    # ------------------------------------------------------------------ repositories
    def create(self, kind: str, name: str, private: bool) -> Repository:
        """A new repository with one commit that holds `.gitattributes`, as the Hub creates it."""
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        sha256 = self.keep(GIT_ATTRIBUTES)
        first = File(".gitattributes", len(GIT_ATTRIBUTES), sha256, git_blob_id(GIT_ATTRIBUTES), False)
        self._add_commit(repository, "main", "initial commit", "", None, {first.path: first})
        return repository

    def delete(self, repository: Repository) -> None:
        del self.repositories[repository.kind, repository.name]
        shutil.rmtree(self._folder(repository))

    def move(self, repository: Repository, name: str) -> None:
        """Renames a repository; 409 where the new name is taken."""
        if (repository.kind, name) in self.repositories:
            raise HubError(409, f"{name} exists")
        old = self._folder(repository)
        del self.repositories[repository.kind, repository.name]
        repository.name = name
        self.repositories[repository.kind, name] = repository
        self._folder(repository).parent.mkdir(parents=True, exist_ok=True)
        old.rename(self._folder(repository))

    def _folder(self, repository: Repository) -> Path:
        return self.root / f"{repository.kind}s" / repository.name

    def folder(self, repository: Repository, revision: str = "main") -> Path:
        """The files of a revision."""
        return self._folder(repository) / repository.find(revision).oid

    # ------------------------------------------------------------------ commits
    def commit(self, repository: Repository, branch: str, lines: list[dict]) -> Commit:
        """Applies the lines of a commit request (`header`, `file`, `lfsFile`, `deletedFile`, `deletedFolder`).

        Raises:
            HubError: 404 no such branch, 412 the branch has moved, 400 an unknown line or a large file that is not here.
        """
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = repository.find(branch)
        files, header = dict(parent.files), {}
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = self._small_file(value)
            elif key == "lfsFile":
                files[value["path"]] = self._large_file(value)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, f"{value['path']} does not exist", "EntryNotFound")
            elif key == "deletedFolder":
                inside = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(inside)}
            else:
                raise HubError(400, f"Unknown commit line {key!r}")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a summary")
        expected = header.get("parentCommit")
        if expected and not parent.oid.startswith(expected):
            raise HubError(412, f"A commit has happened since {expected}")
        return self._add_commit(
            repository, branch, header["summary"], header.get("description", ""), parent.oid, files
        )

    def _small_file(self, value: dict) -> File:
        content = (
            base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
        )
        if is_large(value["path"], len(content), b""):
            raise HubError(400, f"{value['path']} has to be uploaded as a large file")
        return File(value["path"], len(content), self.keep(content), git_blob_id(content), False)

    def _large_file(self, value: dict) -> File:
        path = self.object_path(value["oid"])
        if not path.exists():
            raise HubError(400, f"The content of {value['path']} ({value['oid']}) was never uploaded")
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n".encode()
        return File(value["path"], size, value["oid"], git_blob_id(pointer), True)

    def _add_commit(self, repository, branch, title, message, parent, files) -> Commit:
        listed = {path: file.oid for path, file in sorted(files.items())}
        text = json.dumps([repository.name, branch, title, message, parent, listed, len(repository.commits)])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, message, parent, files)
        folder = self._folder(repository) / commit.oid
        for path, file in files.items():
            target = folder / path
            if folder.resolve() not in target.resolve().parents:
                raise HubError(400, f"{path!r} leaves the repository")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self.object_path(file.sha256), target)
        repository.commits[commit.oid] = commit
        repository.branches[branch] = commit.oid
        return commit
