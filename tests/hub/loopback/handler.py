"""One request to the hub on loopback: reading it, finding its endpoint, knowing who asks, refusing in the Hub's words."""

import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .store import HubError, Repository

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
REPOSITORY = r"/api/(?P<kinds>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"


@dataclass
class User:
    """Owner of a token; `role` is `read` or `write`."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()


@dataclass
class Request:
    method: str
    path: str
    status: int
    user: str | None
    range: str | None = None


def route(method: str, pattern: str):
    """Marks a handler; `pattern` is matched against the whole path, still quoted."""

    def mark(function):
        function.route = (method, re.compile(pattern))
        return function

    return mark


class Handler(BaseHTTPRequestHandler):
    """One request. Methods marked with `route` return JSON to send, or None where they have answered themselves."""

    hub: Any
    protocol_version = "HTTP/1.1"

    # ------------------------------------------------------------------ plumbing
    def _dispatch(self) -> None:
        self._status, self._user = 0, None
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.body = self._read_body()
        try:
            with self.hub.lock:
                self._user = self._authenticate()
            for name in dir(type(self)):
                method, pattern = getattr(getattr(type(self), name), "route", (None, None))
                match = pattern.fullmatch(parts.path) if method == self.command else None
                if match:
                    values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    answer = getattr(self, name)(**values)
                    if self._status == 0:
                        self._json(answer)
                    break
            else:
                raise HubError(404, f"No such endpoint: {self.command} {parts.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | error.headers
            if error.code:
                headers["X-Error-Code"] = error.code
            self._json({"error": error.message} | error.body, error.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            user = self._user.name if self._user else None
            asked = Request(self.command, parts.path, self._status, user, self.headers.get("Range"))
            self.hub.requests.append(asked)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def log_message(self, *args) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict, body: bytes = b"") -> None:
        self._status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._send(status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(value).encode())

    @property
    def payload(self) -> dict:
        return json.loads(self.body or b"{}")

    # ------------------------------------------------------------------ who may do what
    def _authenticate(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token or urlsplit(self.path).path.startswith("/content/"):
            return None
        if token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _writer(self) -> User:
        if self._user is None:
            raise HubError(401, "Invalid username or password.")
        if self._user.role != "write":
            raise HubError(403, "You don't have the required permissions: this token may only read")
        return self._user

    def _repository(self, kinds: str, name: str, write: bool = False, content: bool = False) -> Repository:
        """The repository; an invisible one is answered as the Hub does: 401 to a stranger, 404 to a user."""
        repository, user = self.hub.store.repositories.get((KINDS[kinds], name)), self._user
        member = repository is not None and user is not None and repository.owner in (user.name, *user.organizations)
        if repository is None or (repository.private and not member):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self._writer()
            if not member:
                raise HubError(403, f"You have no right to write to {name}")
        if content and repository.gated and not member and (user is None or user.name not in repository.allowed):
            message = f"Access to model {name} is restricted."
            raise HubError(401 if user is None else 403, message, "GatedRepo")
        return repository
