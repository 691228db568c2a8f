"""recipes/benchmarks/faults.py at its reduced count: kills, damaged checkpoints, signals, full disks and NaN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark forks its runs")
@pytest.mark.timeout(600)
def test_every_disturbed_run_goes_on_and_ends_where_an_undisturbed_one_does(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--counts", "reduced", "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    told = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    cases = {section: sum(row["cases"] for row in told["rows"] if row["section"] == section) for section in
             ("kills", "damage", "signals", "disk")}  # fmt: skip
    assert cases == {"kills": 6, "damage": 3, "signals": 3, "disk": 4}
    assert told["wrong"] == [] and all(row["right"] == row["cases"] for row in told["rows"])
    assert not any(row["silent"] for row in told["rows"]) and not any(row["orphans"] for row in told["rows"])
