"""A hub on loopback for tests; see server.py."""

from .guard import only_loopback
from .handler import Request, User
from .server import Hub
from .store import HubError

__all__ = ["Hub", "HubError", "Request", "User", "only_loopback"]
