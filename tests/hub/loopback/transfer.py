"""Endpoints that move files: preupload, Git LFS, commit, resolve."""

import base64
import json
import re
from urllib.parse import quote

from .handler import REPOSITORY, Handler, route
from .store import HubError, is_large


class TransferEndpoints(Handler):
    """Upload and download."""

    # ------------------------------------------------------------------ upload
    @route("POST", REPOSITORY + r"/preupload/(?P<revision>[^/]+)")
    def preupload(self, kinds, name, revision):
        commit, files = self._repository(kinds, name, write=True).find(revision), []
        for file in self.payload["files"]:
            large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            there = commit.files.get(file["path"])
            told = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            # For a large file the Hub compares SHA-256, for a small one git's blob id.
            files.append(told | {"oid": there and (there.sha256 if there.large else there.oid)})
        return {"files": files}

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def lfs_batch(self, name):
        self._repository("models", name, write=True)
        objects = []
        for asked in self.payload["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if not self.hub.store.object_path(asked["oid"]).exists():
                base = f"{self.hub.storage_url}/content/{asked['oid']}"
                upload = {"href": f"{base}?key={self.hub.secret}"}
                if asked["size"] > self.hub.part_size:
                    count = -(-asked["size"] // self.hub.part_size)
                    upload["header"] = {"chunk_size": str(self.hub.part_size)}
                    upload["header"] |= {
                        f"{n:05d}": f"{base}?key={self.hub.secret}&part={n}" for n in range(1, count + 1)
                    }
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        return {"transfer": "basic", "objects": objects}

    def _check_key(self) -> None:
        if self.query.get("key") != self.hub.secret:
            raise HubError(403, "This address is not signed")

    @route("PUT", r"/content/(?P<sha256>[0-9a-f]{64})")
    def upload(self, sha256):
        self._check_key()
        if "part" in self.query:
            self.hub.parts[sha256, int(self.query["part"])] = self.body
            self._send(200, {"ETag": f'"part{self.query["part"]}"'})
        else:
            self._keep(sha256, self.body)
            self._send(200, {})

    @route("POST", r"/content/(?P<sha256>[0-9a-f]{64})")
    def complete_upload(self, sha256):
        self._check_key()
        numbers = [part["partNumber"] for part in self.payload["parts"]]
        self._keep(sha256, b"".join(self.hub.parts.pop((sha256, number)) for number in numbers))
        return {}

    def _keep(self, sha256: str, content: bytes) -> None:
        if self.hub.store.keep(content) != sha256:
            raise HubError(400, f"The content's SHA-256 is not {sha256}")

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/verify")
    def verify_upload(self, name):
        self._repository("models", name, write=True)
        path = self.hub.store.object_path(self.payload["oid"])
        if not path.exists() or path.stat().st_size != self.payload["size"]:
            raise HubError(404, "The content was not uploaded", "EntryNotFound")
        return {}

    @route("POST", REPOSITORY + r"/commit/(?P<branch>[^/]+)")
    def commit(self, kinds, name, branch):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            made = self.hub.store.commit(self._repository(kinds, name, write=True), branch, lines)
        return {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}"}

    # ------------------------------------------------------------------ download
    @route("HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def head(self, name, revision, path):
        self.resolve(name, revision, path)

    @route("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, name, revision, path):
        commit = self._repository("models", name, content=True).find(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", headers)
        file = commit.files[path]
        if not file.large:
            self._content(file.sha256, path, headers | {"ETag": f'"{file.oid}"'})
            return
        headers |= {"X-Linked-Size": file.size, "X-Linked-Etag": f'"{file.sha256}"'}
        signed = f"{self.hub.storage_url}/content/{file.sha256}?key={self.hub.secret}&name={quote(path, safe='')}"
        self._send(302, headers | {"Location": signed, "ETag": f'"{file.oid}"'})

    @route("HEAD", r"/content/(?P<sha256>[0-9a-f]{64})")
    def head_content(self, sha256):
        self.content(sha256)

    @route("GET", r"/content/(?P<sha256>[0-9a-f]{64})")
    def content(self, sha256):
        self._check_key()
        self._content(sha256, self.query.get("name", sha256), {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _content(self, sha256: str, path: str, headers: dict) -> None:
        """The file, or the part that a Range header asks for; an interruption closes the connection on the way."""
        content, status = self.hub.store.object_path(sha256).read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            if first >= len(content):
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        cut = self.hub.take_interruption(path.split("/")[-1]) if self.command == "GET" else None
        if cut is None:
            self._send(status, headers, content)
            return
        self._send(status, headers | {"Content-Length": len(content)}, content[:cut])
        self.wfile.flush()
        self.close_connection = True
