"""A hub on loopback: the endpoints of the Hugging Face Hub that `huggingface_hub` uses, spoken by a real HTTP server.

    with Hub(folder, tokens={"hf_writer": User("writer")}) as hub:
        environment = hub.environment("hf_writer")  # for a subprocess: HF_ENDPOINT, HF_TOKEN, ...

Large files travel by Git LFS (basic transfer, or several parts above `part_size`); Xet is switched off in
`environment`. `hub.requests` lists what was asked, `hub.interrupt(name, after)` closes connections in the middle of a file.
"""

import os
import secrets
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from .endpoints import RepositoryEndpoints
from .handler import Request, User
from .store import Repository, Store
from .transfer import TransferEndpoints


@dataclass
class Hub:
    """The server, its store and what it was asked."""

    root: Path
    tokens: dict[str, User] = field(default_factory=dict)
    part_size: int = 1 << 30
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self.store = Store(self.root)
        self.secret = secrets.token_hex(8)
        self.lock = threading.RLock()
        self.parts: dict[tuple[str, int], bytes] = {}
        self._interruptions: dict[str, list[int]] = {}

    def __enter__(self) -> "Hub":
        handler = type("HubHandler", (RepositoryEndpoints, TransferEndpoints), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage_url(self) -> str:
        """Where large files lie: under another host name, as on the Hub, so that clients send no token there."""
        return f"http://localhost:{self._server.server_port}"

    def environment(self, token: str | None = None, cache: Path | None = None) -> dict[str, str]:
        """Variables under which a process uses this hub, and neither a cache nor a token of its own."""
        values = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        home = Path(cache or self.root / "client")
        values |= {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_TOKEN": token or "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip
        return values

    def interrupt(self, file_name: str, after: int, times: int = 1) -> None:
        """The next `times` downloads of a file of this name end after `after` bytes."""
        self._interruptions[file_name] = [after] * times

    def take_interruption(self, file_name: str) -> int | None:
        left = self._interruptions.get(file_name)
        return left.pop() if left else None

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.store.repositories[kind, name]

    def folder(self, name: str, revision: str = "main") -> Path:
        """The files of a model repository's revision, as they lie on the server."""
        return self.store.folder(self.repository(name), revision)
