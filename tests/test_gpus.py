"""available_gpus and gpus_per_subtask: what a run sees, or a sentence."""

import os

import pytest

from tokcom_hf.gpus import use_gpus


@pytest.fixture
def machine(monkeypatch):
    """A machine with four GPUs and a run of `processes`."""

    def make(processes=1, gpus=4, visible=None):
        monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        # Set before it is removed, so that what `use_gpus` writes is undone, too.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    return make


def test_the_first_available_gpus_are_seen(machine):
    machine(processes=2)
    assert use_gpus([0, 1, 2, 3], 2) == "The run uses GPU 0,1." and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    machine()
    assert use_gpus([3, 1]) == "The run uses GPU 3."
    machine(visible="4,5,6")
    assert use_gpus([1, 2], 1) == "The run uses GPU 5."
    assert use_gpus(None, None) is None


def test_a_machine_without_gpus_says_so(machine):
    machine(gpus=0)
    assert "has no CUDA device" in use_gpus([0, 1, 2, 3], 2)


@pytest.mark.parametrize(
    ("available", "per_run", "message"),
    [
        ([0, 1, 2, 3], 2, "accelerate launch --num_processes 2"),
        ([0, 9], None, r"names \[9\], but this machine has 4 visible"),
        ([0, 0], None, "different GPU numbers"),
        ([], None, "different GPU numbers"),
        ([0], 2, "at most the number of available_gpus"),
    ],
)
def test_what_cannot_act_is_refused(machine, available, per_run, message):
    machine()
    with pytest.raises(ValueError, match=message):
        use_gpus(available, per_run)
