"""Settings that hold for every test."""

import os

# One worker per core: two threads each would only wait for one another. Before the first import of torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the Hub for anything; those of the loopback hub say otherwise for the processes they start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
