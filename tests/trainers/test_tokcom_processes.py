"""TokCom stages in other processes: a killed run ends where an undisturbed one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import start

STAGES = ("vae", "denoiser", "posterior", "rows", "distill")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """What tests/helpers/tokcom_worker.py leaves."""
    folder = tmp_path_factory.mktemp("processes")
    start("tokcom_worker", folder)
    return folder


def results(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "told.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_and_resume_end_at_the_same_losses_and_weights(work, stage):
    (whole, first), (cut, second) = results(work / "whole" / stage), results(work / "cut" / stage)
    assert cut["losses"] == whole["losses"]
    for name in first:
        assert torch.equal(first[name], second[name]), name
