"""With deprecation and future warnings as errors: the import, and forward, generate and pipelines of every model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STRICT = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
EVERY_MODEL = """
import sys
import torch
from rows import ROWS, outputs
import pipeline_threads as bench
from transformers import pipeline
for row in ROWS:
    model = row.build().eval()
    outputs(row, model)
    if row.generate is not None:
        row.generate(model)
from pathlib import Path
for number, (name, (task, build)) in enumerate(bench.BUILDERS.items()):
    build(Path(sys.argv[1]) / str(number))
    pipe = pipeline(task, model=str(Path(sys.argv[1]) / str(number)), device="cpu")
    for index in (1, 2):
        inputs, options = bench.request(name, index)
        pipe(*inputs, **options)
"""


def run(*arguments: str, folders: tuple[Path, ...] = ()) -> str:
    """What the process prints; `folders`: modules that it imports beside the package."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, *folders))),
        "TRANSFORMERS_VERBOSITY": "warning",
    }
    done = subprocess.run(
        [sys.executable, *STRICT, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_import_is_silent():
    assert run("-c", "import tokcom_hf; [getattr(tokcom_hf, name) for name in tokcom_hf.__all__]") == ""


@pytest.mark.slow
def test_every_model_runs_without_a_deprecation(tmp_path):
    folders = (TESTS / "hub", TESTS.parent / "recipes" / "benchmarks")
    output = run("-c", EVERY_MODEL, str(tmp_path), folders=folders)
    assert "deprecated" not in output, output
