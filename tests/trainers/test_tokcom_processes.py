"""TokCom stages in other processes: two ranks are one process, and a killed run ends where an undisturbed one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import start

STAGES = ("vae", "denoiser", "rows", "distill")
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
def test_two_ranks_match_one_process_with_the_same_global_batch(work, stage):
    (one, first), (two, second) = results(work / "whole" / stage), results(work / "two" / stage)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(one["losses"]) == 12 and two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_and_resume_end_at_the_same_losses_and_weights(work, stage):
    (whole, first), (cut, second) = results(work / "whole" / stage), results(work / "cut" / stage)
    assert cut["losses"] == whole["losses"]
    for name in first:
        assert torch.equal(first[name], second[name]), name
