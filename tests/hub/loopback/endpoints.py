"""Endpoints about users, repositories, their contents, branches and tags."""

from urllib.parse import parse_qs

import yaml

from .handler import REPOSITORY, Handler, route
from .store import HubError


class RepositoryEndpoints(Handler):
    """Everything but the transfer of files."""

    # ------------------------------------------------------------------ users and repositories
    @route("GET", r"/api/whoami-v2")
    def whoami(self):
        if self._user is None:
            raise HubError(401, "Invalid username or password.")
        user = self._user
        token = {"displayName": "test", "role": user.role}
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        return {"type": "user", "name": user.name, "orgs": organizations, "auth": {"accessToken": token}}

    @route("POST", r"/api/repos/create")
    def create_repository(self):
        user, asked = self._writer(), self.payload
        owner = asked.get("organization") or user.name
        if owner not in (user.name, *user.organizations):
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        kind, address = asked.get("type") or "model", f"{self.hub.url}/{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.store.repositories:
                raise HubError(409, f"You already created this {kind} repo: {name}", url=address)
            self.hub.store.create(kind, name, private)
        return {"url": address, "name": name, "id": name}

    @route("DELETE", r"/api/repos/delete")
    def delete_repository(self):
        asked = self.payload
        name = f"{asked.get('organization') or self._writer().name}/{asked['name']}"
        with self.hub.lock:
            self.hub.store.delete(self._repository(f"{asked.get('type') or 'model'}s", name, write=True))
        return {}

    @route("POST", r"/api/repos/move")
    def move_repository(self):
        asked = self.payload
        with self.hub.lock:
            repository = self._repository(f"{asked.get('type') or 'model'}s", asked["fromRepo"], write=True)
            self.hub.store.move(repository, asked["toRepo"])
        return {}

    @route("PUT", REPOSITORY + r"/settings")
    def change_settings(self, kinds, name):
        repository, asked = self._repository(kinds, name, write=True), self.payload
        if "visibility" in asked or "private" in asked:
            repository.private = asked.get("visibility", "public") == "private" or bool(asked.get("private"))
        if "gated" in asked:
            repository.gated = bool(asked["gated"])
        return {"private": repository.private, "gated": repository.gated}

    @route("GET", REPOSITORY + r"/auth-check")
    def check_access(self, kinds, name):
        self._repository(kinds, name, content=True)
        return {}

    @route("POST", r"/api/validate-yaml")
    def validate_card(self):
        try:
            _card_data(self.payload["content"])
        except (yaml.YAMLError, ValueError) as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return None
        return {"errors": [], "warnings": []}

    # ------------------------------------------------------------------ what is in a repository
    @route("GET", REPOSITORY + r"(/revision/(?P<revision>[^/]+))?")
    def info(self, kinds, name, revision="main"):
        repository = self._repository(kinds, name)
        commit = repository.find(revision)
        told = {
            "id": name,
            "modelId": name,
            "author": repository.owner,
            "sha": commit.oid,
            "private": repository.private,
        }
        told |= {"gated": "auto" if repository.gated else False, "disabled": False, "tags": [], "downloads": 0}
        told["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
        if "README.md" in commit.files:
            card = _card_data(self.hub.store.object_path(commit.files["README.md"].sha256).read_text("utf-8"))
            told |= {"cardData": card, "tags": list(card.get("tags") or [])}
            told |= {key: card[key] for key in ("pipeline_tag", "library_name") if card.get(key)}
        return told

    @route("GET", REPOSITORY + r"/tree/(?P<revision>[^/]+)(/(?P<below>.+))?")
    def tree(self, kinds, name, revision, below=""):
        commit = self._repository(kinds, name, content=True).find(revision)
        inside = f"{below.rstrip('/')}/" if below else ""
        files = [file for path, file in sorted(commit.files.items()) if path.startswith(inside)]
        if inside and not files:
            raise HubError(404, f"{below} does not exist", "EntryNotFound")
        recursive, entries = self.query.get("recursive", "").lower() in ("true", "1"), {}
        for file in files:
            steps = file.path.removeprefix(inside).split("/")
            for depth in range(1, len(steps)) if recursive else range(1, min(2, len(steps))):
                folder = inside + "/".join(steps[:depth])
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if recursive or len(steps) == 1:
                entries[file.path] = file.entry()
        return list(entries.values())

    @route("POST", REPOSITORY + r"/paths-info/(?P<revision>[^/]+)")
    def paths(self, kinds, name, revision):
        commit = self._repository(kinds, name, content=True).find(revision)
        asked = self.payload["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        return [commit.files[path].entry() for path in asked if path in commit.files]

    @route("GET", REPOSITORY + r"/refs")
    def refs(self, kinds, name):
        repository = self._repository(kinds, name)
        listed = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in names.items()]
            for kind, place, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        return listed | {"converts": [], "pullRequests": []}

    @route("GET", REPOSITORY + r"/commits/(?P<revision>[^/]+)")
    def commits(self, kinds, name, revision):
        date = "2026-01-01T00:00:00.000Z"
        found = self._repository(kinds, name).history(revision)
        return [{"id": c.oid, "title": c.title, "message": c.message, "date": date, "authors": []} for c in found]

    # ------------------------------------------------------------------ branches and tags
    @route("POST", REPOSITORY + r"/branch/(?P<branch>[^/]+)")
    def create_branch(self, kinds, name, branch):
        repository = self._repository(kinds, name, write=True)
        if branch in repository.branches:
            raise HubError(409, f"Reference {branch} exists")
        repository.branches[branch] = repository.find(self.payload.get("startingPoint") or "main").oid
        return {}

    @route("DELETE", REPOSITORY + r"/branch/(?P<branch>[^/]+)")
    def delete_branch(self, kinds, name, branch):
        repository = self._repository(kinds, name, write=True)
        if branch == "main":
            raise HubError(403, "The main branch cannot be deleted")
        if repository.branches.pop(branch, None) is None:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return {}

    @route("POST", REPOSITORY + r"/tag/(?P<revision>[^/]+)")
    def create_tag(self, kinds, name, revision):
        repository, tag = self._repository(kinds, name, write=True), self.payload["tag"]
        if tag in repository.tags:
            raise HubError(409, f"Tag {tag} exists")
        repository.tags[tag] = repository.find(revision).oid
        return {}

    @route("DELETE", REPOSITORY + r"/tag/(?P<tag>[^/]+)")
    def delete_tag(self, kinds, name, tag):
        if self._repository(kinds, name, write=True).tags.pop(tag, None) is None:
            raise HubError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return {}


def _card_data(text: str) -> dict:
    """Metadata of a model card; ValueError or YAMLError where the block at its top is no mapping."""
    if not text.startswith("---\n"):
        return {}
    block, found, _ = text[4:].partition("\n---")
    if not found:
        raise ValueError("The metadata block has no end")
    data = yaml.safe_load(block) or {}
    if not isinstance(data, dict):
        raise ValueError("Metadata must be a mapping")
    return data
