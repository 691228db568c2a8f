"""Runs one case and gives its verdict: refused, accepted, or one of the faults.

A refusal is a `ValueError`, `TypeError` or `OSError` (at the command line `error: …` and exit code 2) whose message is one
line that names the file or the argument. The faults are a traceback, no error at all, ten seconds without an answer, code of
the file that ran, an attempt to reach the network, memory allocated because the file asks for it, and an unclear message.
"""

import contextlib
import io
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokcom_hf.cli import run_recipe

SECONDS = 10
# Bytes of address space that a case may allocate beyond what the process has.
MEMORY = 6 << 30
LONGEST = 1000  # characters of a message
REFUSALS = (ValueError, TypeError, OSError)
FAULTS = ("traceback", "silent", "hang", "code executed", "request", "memory", "unclear")


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        kind: kind of input, which is its row of the table.
        name: what is wrong with the input.
        run: reads the input.
        words: the message must hold one of these, for example the file's name; empty for any message.
        fine: the input is good and must be accepted.
    """

    kind: str
    name: str
    run: Callable[[], Any]
    words: tuple[str, ...] = ()
    fine: bool = False


@dataclass(frozen=True)
class Outcome:
    """Verdict of a case (`refused`, `accepted` or a fault), its error message, and the seconds it took."""

    kind: str
    name: str
    verdict: str
    message: str
    seconds: float


class Hang(BaseException):
    """The case gave no answer within `SECONDS`."""


class Request(BaseException):
    """The case tried to connect or to look up a host name."""


def at_command_line(main: Callable[..., Any], argv: list[str]) -> None:
    """Runs a recipe as its command line does.

    Raises:
        ValueError: the recipe ended with exit code 2; the message is its one error line.
        AssertionError: the recipe ended with another exit code, or with another number of error lines.
    """
    before, errors = sys.argv, io.StringIO()
    sys.argv = ["recipe.py", *argv]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_recipe(main)
    except SystemExit as end:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        if end.code != 2 or len(lines) != 1:
            raise AssertionError(f"exit code {end.code!r}, {len(lines)} error lines") from None
        rest = errors.getvalue().partition("error: ")[2].rstrip("\n")
        raise ValueError(rest) from None
    finally:
        sys.argv = before


def run_case(case: Case, canary: Path) -> Outcome:
    """Runs a case without network, with at most `MEMORY` more bytes, for at most `SECONDS`.

    Args:
        canary: file that exists only if code inside an input ran.
    """
    started = time.monotonic()
    verdict, message = "silent", ""
    try:
        with warnings.catch_warnings(), limited_time(), limited_memory(), no_network() as tried:
            warnings.simplefilter("ignore")
            case.run()
    except REFUSALS as error:
        verdict, message = "refused", str(error)
        if not is_sentence(message, case.words):
            verdict = "unclear"
    except Hang:
        verdict = "hang"
    except Request as error:
        verdict, message = "request", str(error)
    except MemoryError as error:
        verdict, message = "memory", repr(error)
    except Exception as error:  # every other exception is a fault of its own kind
        verdict, message = "traceback", f"{type(error).__name__}: {error}"
        if "allocate" in message or "memory" in message.lower():
            verdict = "memory"
    seconds = time.monotonic() - started
    if tried:
        verdict, message = "request", f"{tried[0]} {message}"
    if canary.exists():
        canary.unlink()
        verdict = "code executed"
    elif seconds > SECONDS:
        verdict = "hang"
    if case.fine:
        verdict = "accepted" if verdict == "silent" else f"a good input: {verdict}"
    return Outcome(case.kind, case.name, verdict, message[:LONGEST], round(seconds, 3))


def is_sentence(message: str, words: tuple[str, ...]) -> bool:
    """Whether a message is one line of at most `LONGEST` characters with one of `words`, if there are any."""
    return 0 < len(message) <= LONGEST and "\n" not in message and (not words or any(w in message for w in words))


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Raises `Hang` in the main thread after `SECONDS`, by SIGUSR2: the code under test may use SIGALRM."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(SECONDS, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Limits the process to `MEMORY` bytes of address space beyond what it has."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # only Linux has this file
        yield
        return
    used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def no_network() -> Iterator[list[str]]:
    """Makes every connection and host lookup raise `Request`; yields the list of those tried."""
    tried: list[str] = []

    def refuse(*arguments, **_):
        tried.append(str([part for part in arguments if not isinstance(part, socket.socket)])[:100])
        raise Request(tried[-1])

    names = ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"))
    before = [getattr(owner, name) for owner, name in names]
    for owner, name in names:
        setattr(owner, name, refuse)
    try:
        yield tried
    finally:
        for (owner, name), value in zip(names, before):
            setattr(owner, name, value)
