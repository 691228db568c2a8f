"""Refuses every connection that would leave this machine: `python guard.py SCRIPT ARGUMENTS` runs a script so."""

import runpy
import socket
import sys
from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def only_loopback() -> None:
    """From here on this process connects, and looks names up, on loopback only; anything else raises ConnectionError."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def checked_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise ConnectionError(f"A connection to {address} would leave loopback.")
        return connect(self, address)

    def checked_look_up(host, *args, **kwargs):
        if host not in (*LOOPBACK, None, ""):
            raise ConnectionError(f"Looking up {host!r} would leave loopback.")
        return look_up(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = checked_connect, checked_look_up


if __name__ == "__main__":
    only_loopback()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
