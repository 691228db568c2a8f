"""The pruning recipes from end to end, at a small setting: pretrain, train, evaluate, search, compare, measure."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import load

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL_VLM = [
    "--image_size", "32", "--vision.hidden_size", "16", "--vision.intermediate_size", "16",
    "--text.hidden_size", "32", "--text.intermediate_size", "32", "--text.num_hidden_layers", "4",
    "--tower_steps", "4", "--grid", "4", "--eval_questions", "30", "--max_steps", "4",
    "--per_device_train_batch_size", "8", "--threads", "1",
]  # fmt: skip
SMALL_RUN = [
    "--train_images", "60", "--eval_questions", "30", "--max_steps", "4", "--per_device_train_batch_size", "8",
    "--target_merge_tokens", "8", "--keep_tokens", "5", "3",
]  # fmt: skip


def recipe(monkeypatch, script, *arguments):
    torch.set_num_threads(1)
    path = (RECIPES / script).resolve()
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    load(path.stem).main()


@pytest.mark.slow
def test_every_pruning_recipe_runs_on_what_the_one_before_left(tmp_path, monkeypatch, capsys):
    vlm, pruned = tmp_path / "vlm", tmp_path / "pruned"
    recipe(monkeypatch, "pretrain_vlm.py", "--output_dir", vlm, *SMALL_VLM)
    assert json.loads((vlm / "results.json").read_text())["scenes"]["image_size"] == 32
    recipe(
        monkeypatch, "train_token_pruning.py", "--base_model", vlm, "--output_dir", pruned, *SMALL_RUN, "--threads", 1
    )
    results = json.loads((pruned / "results.json").read_text())
    assert results["scenes"] == json.loads((vlm / "results.json").read_text())["scenes"]
    assert results["modes"]["hard"]["vision_tokens_per_layer"] == pytest.approx([8, 5, 3, 3])
    card = (pruned / "README.md").read_text(encoding="utf-8")
    assert f"{100 * results['modes']['hard']['flops_ratio']:.1f} %" in card
    recipe(
        monkeypatch,
        "eval_token_pruning.py",
        "--model",
        pruned,
        "--output_dir",
        tmp_path / "eval",
        "--eval_questions",
        20,
    )
    evaluated = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert evaluated["keep_ratio_merge"] == pytest.approx(0.5) and evaluated["times"]["hard"]["prefill"] > 0
    free = [
        "--model",
        vlm,
        "--keep",
        4,
        "--output_dir",
        tmp_path / "free",
        "--eval_questions",
        20,
        "--strategy_layer",
        1,
    ]
    recipe(monkeypatch, "eval_token_pruning.py", *free, "--strategy", "fastv")
    layers = json.loads((tmp_path / "free" / "results.json").read_text())["modes"]["hard"]["vision_tokens_per_layer"]
    assert layers == [16] + [4] * (len(layers) - 1)
    search = ["--base_model", vlm, "--output_dir", tmp_path / "search", "--trials", 2]
    recipe(monkeypatch, "search_token_pruning.py", *search, *SMALL_RUN)
    assert set(json.loads((tmp_path / "search" / "best.json").read_text())["parameters"]) >= {"kl_weight"}
    compare = [
        "--base_model",
        vlm,
        "--output_dir",
        tmp_path / "compare",
        "--seeds",
        1,
        "--ablations",
        "false",
        "--threads",
        1,
    ]
    recipe(monkeypatch, "benchmarks/token_pruning.py", *compare, *SMALL_RUN)
    table = json.loads((tmp_path / "compare" / "results.json").read_text())
    ours = table["merger + pruners + LoRA"]["flops_ratio"]
    assert all(row["flops_ratio"] >= ours for name, row in table.items() if name.startswith(("random", "divprune")))
    assert {"random + LoRA", "divprune + LoRA"} <= set(table) and table["unpruned + LoRA"]["flops_ratio"] == 1.0
    assert all(0 <= row["accuracy"] <= 1 for row in table.values())
    # Seeds of an earlier, longer run in the folder do not count.
    saved = json.loads((tmp_path / "compare" / "rows.json").read_text())
    for row in saved["table"].values():
        row["7"] = row["0"] | {"flops_ratio": 9.0}
    (tmp_path / "compare" / "rows.json").write_text(json.dumps(saved))
    recipe(monkeypatch, "benchmarks/token_pruning.py", *compare, *SMALL_RUN)
    assert json.loads((tmp_path / "compare" / "results.json").read_text()) == table
    shape = ["--hidden_size", 128, "--intermediate_size", 256, "--heads", 4, "--layers", 4, "--vision_layers", 1]
    recipe(monkeypatch, "benchmarks/prefill.py", *shape, "--repeats", 1, "--output_dir", tmp_path / "prefill")
    measured = json.loads((tmp_path / "prefill" / "results.json").read_text())
    assert measured["kv_measured"] == pytest.approx(measured["kv_predicted"])
    recipe(monkeypatch, "benchmarks/prefill.py", "--documented", "true", "--output_dir", tmp_path / "documented")
    documented = json.loads((tmp_path / "documented" / "documented.json").read_text())
    first = next(iter(documented.values()))
    assert first["vision_tokens_per_layer"][10:21:10] == [144, 72] and first["flops_ratio"] == pytest.approx(
        0.36, abs=0.01
    )


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist; run recipes/train_token_pruning"):
        monkeypatch.chdir(tmp_path)
        recipe(monkeypatch, "eval_token_pruning.py")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        recipe(monkeypatch, "train_token_pruning.py", "--output_dir", tmp_path / "full")
