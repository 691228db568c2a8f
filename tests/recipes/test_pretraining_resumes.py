"""pretrain_vlm.py and pretrain_internvl.py go on from a checkpoint with every tensor as it was."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipes import load

RECIPES = Path(__file__).parents[2] / "recipes"
COMMON = [
    "--tower_steps", "2", "--eval_questions", "5", "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "3",
    "--per_device_train_batch_size", "4", "--threads", "1", "--use_cpu", "true", "--vision.hidden_size", "16",
    "--vision.intermediate_size", "16", "--text.hidden_size", "32", "--text.intermediate_size", "32",
    "--text.num_hidden_layers", "2", "--vision.image_size", "32",
]  # fmt: skip
OWN = {"pretrain_vlm": ["--grid", "4"], "pretrain_internvl": ["--scenes.image_size", "32", "--vision.patch_size", "4"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_resumed_pretraining_ends_with_the_same_weights(tmp_path, monkeypatch, name):
    torch.set_num_threads(1)
    module = load(name)
    out = tmp_path / "out"
    arguments = [f"{name}.py", *COMMON, *OWN[name], "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    whole, results = load_file(out / "model.safetensors"), json.loads((out / "results.json").read_text())
    assert results["tower"] and (out / "README.md").is_file()
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-4")
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume_from_checkpoint", "true"])
    module.main()
    resumed = load_file(out / "model.safetensors")
    assert set(resumed) == set(whole)
    assert [key for key, value in whole.items() if not torch.equal(value, resumed[key])] == []
    assert json.loads((out / "results.json").read_text())["tower"] == results["tower"]
