"""Settings that hold for every test."""

import os
import re
from pathlib import Path

# One worker per core: two threads each would only wait for one another. Before the first import of torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the Hub for anything; those of the loopback hub say otherwise for the processes they start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DOCUMENTS = Path(__file__).parents[1] / "docs" / "documents.md"
skipped: set[str] = set()


def pytest_runtest_logreport(report) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped.add(report.nodeid.partition("[")[0])


def pytest_sessionfinish(session) -> None:
    """A row of docs/documents.md whose test was skipped is a row without a test."""
    if hasattr(session.config, "workerinput"):  # a worker of xdist: its reports reach the process that started it
        return
    named = set(re.findall(r"`(tests/[^`]+::[^`]+)`", DOCUMENTS.read_text(encoding="utf-8")))
    if unseen := sorted(named & skipped):
        print(f"\ndocs/documents.md names tests that were skipped: {', '.join(unseen)}")
        session.exitstatus = 1
