"""The pruning documents' commands and YAML blocks, retyped: what each sets, and that it runs to its end at a small size."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.helpers.pruning_documents import RECIPES, run_script, save_small_llava
from tokcom_hf import LayerPrunerConfig, TokenMergerConfig, TokenPruningTrainingArguments
from tokcom_hf.cli import parse_recipe
from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING

TRAINING_SETTINGS = """\
trainer_settings:
  dl_settings:
    epochs: 1
    batch_size: 12
    optimizers:
      token_merger:
        lr: "2e-05"
      layer_pruners:
        lr: "2e-05"
      discriminator:
        lr: "5e-04"
"""
METHOD_SETTINGS = """\
method_settings:
  merger_type: "simple"
  merge_ratio: 0.5
  target_merge_tokens: 288
  merge_sparsity_weight: 1e-4
  pruning_layers: [10, 20, 31]
  pruner_d_internal: 512
  pruner_num_heads: 4
  pruner_type: "cross_attention"
  temperature: 1.0
  temperature_min: 0.1
  temperature_anneal_rate: 0.5
  adv_loss_weight: 1.0
  task_loss_weight: 25.0
"""
SUMMARY_SETTINGS = """\
trainer_settings:
  optimizers:
    token_merger:
      lr: 2e-05
    layer_pruners:
      lr: 2e-05
    discriminator:
      lr: 5e-04
"""
SEARCH_SETTINGS = """\
manager_settings:
  mode: "optuna"

search_settings:
  enable: true
  n_trials: 50
"""
GPU_SETTINGS = """\
manager_settings:
  available_gpus: [0,1,2,3]
  gpus_per_subtask: 2
"""
# Sizes of the small LLaVA: 16 vision tokens instead of 576.
SMALL = ["--train_images", 24, "--eval_questions", 6, "--max_steps", 2, "--batch_size", 4, "--threads", 1]
EIGHT = ["--target_merge_tokens", 8, "--pruner_d_internal", 8]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("llava") / "small_vlm")


@pytest.fixture
def values(tmp_path, monkeypatch):
    """Reads a documented YAML text as the recipe does; returns the values of its sections."""
    monkeypatch.syspath_prepend(str(RECIPES))
    from train_token_pruning import SECTIONS

    def read(text: str) -> dict:
        file = tmp_path / "vision_token_pruning.yaml"
        file.write_text(text)
        return parse_recipe("Doc.", SECTIONS, file, [], TRAIN_TOKEN_PRUNING)

    return read


def method(lines: str) -> str:
    return "method_settings:\n" + "".join(f"  {line}\n" for line in lines.strip().splitlines())


def optimizers(lines: str) -> str:
    text = "trainer_settings:\n  dl_settings:\n    optimizers:\n"
    return text + "".join(f"      {line}\n" for line in lines.strip().splitlines())


# ---------------------------------------------------------------------- what the blocks set
def test_training_settings_block(values):
    training = values(TRAINING_SETTINGS)["training"]
    assert training == {
        "num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 12, "merger_learning_rate": 2e-5,
        "pruner_learning_rate": 2e-5, "discriminator_learning_rate": 5e-4,
    }  # fmt: skip
    TokenPruningTrainingArguments(output_dir="unused", **training)


def test_method_settings_blocks(values):
    read = values(METHOD_SETTINGS)
    assert read["merger"] == {"merger_type": "simple", "merge_ratio": 0.5, "target_merge_tokens": 288}
    assert read["pruner"] == {
        "layers": [10, 20, 31], "internal_size": 512, "num_attention_heads": 4, "pruner_type": "cross_attention"
    }  # fmt: skip
    assert read["training"] == {
        "merge_sparsity_weight": 1e-4, "temperature_start": 1.0, "temperature_end": 0.1, "temperature_anneal_rate": 0.5,
        "adversarial_weight": 1.0, "task_weight": 25.0,
    }  # fmt: skip
    TokenMergerConfig(**read["merger"]), LayerPrunerConfig(**read["pruner"])


def test_summary_yaml_block(values):
    read = values(SUMMARY_SETTINGS + "\n" + METHOD_SETTINGS)
    rates = [read["training"][f"{part}_learning_rate"] for part in ("merger", "pruner", "discriminator")]
    assert rates == [2e-5, 2e-5, 5e-4] and read["merger"]["merge_ratio"] == 0.5


def test_search_and_gpu_blocks(values):
    assert values(SEARCH_SETTINGS)["run"] == {"mode": "optuna", "search": True, "trials": 50}
    assert values(GPU_SETTINGS)["run"] == {"available_gpus": [0, 1, 2, 3], "gpus_per_subtask": 2}


@pytest.mark.parametrize(
    ("block", "section", "expected"),
    [
        (method("merge_ratio: 0.6\ntarget_merge_tokens: 346"), "merger", {"merge_ratio": 0.6, "target_merge_tokens": 346}),
        (method("merge_ratio: 0.4\ntarget_merge_tokens: 230"), "merger", {"merge_ratio": 0.4, "target_merge_tokens": 230}),
        (method("pruning_layers: [5, 15, 25]"), "pruner", {"layers": [5, 15, 25]}),
        (method("pruning_layers: [20, 25, 31]"), "pruner", {"layers": [20, 25, 31]}),
        (
            method("pruning_layers: [8, 12, 16, 20, 24, 28, 31]"),
            "pruner",
            {"layers": [8, 12, 16, 20, 24, 28, 31]},
        ),
        (method('merger_type: "simple"'), "merger", {"merger_type": "simple"}),
        (method('merger_type: "question_aware"'), "merger", {"merger_type": "question_aware"}),
        (optimizers('token_merger:\n  lr: "5e-05"'), "training", {"merger_learning_rate": 5e-5}),
        (optimizers('discriminator:\n  lr: "2e-04"'), "training", {"discriminator_learning_rate": 2e-4}),
        (method("task_loss_weight: 50.0"), "training", {"task_weight": 50.0}),
        (method("adv_loss_weight: 2.0"), "training", {"adversarial_weight": 2.0}),
        (method("merge_sparsity_weight: 5e-4"), "training", {"merge_sparsity_weight": 5e-4}),
        (method("merge_sparsity_weight: 1e-3"), "training", {"merge_sparsity_weight": 1e-3}),
        (method("adv_loss_weight: 0.5"), "training", {"adversarial_weight": 0.5}),
        (method("disc_reinit_prob: 0.1"), "training", {"discriminator_reinit_probability": 0.1}),
        ("trainer_settings:\n  dl_settings:\n    batch_size: 6\n", "training", {"per_device_train_batch_size": 6}),
    ],
)  # fmt: skip
def test_common_adjustments(values, block, section, expected):
    assert values(block)[section] == expected
    if "merge_ratio" in expected:
        # The two numbers of a block say the same of 576 tokens.
        merger = TokenMergerConfig(merge_ratio=expected["merge_ratio"])
        assert abs(merger.merge_ratio * 576 - expected["target_merge_tokens"]) <= 1


def test_paper_configuration_is_the_document(values):
    """Every value of the documents' YAML blocks, and nothing of ours left on."""
    read = values((RECIPES / "configs" / "paper" / "train_token_pruning.yaml").read_text())
    documented = values(TRAINING_SETTINGS + METHOD_SETTINGS)
    for section in ("merger", "pruner", "training"):
        for name, value in documented[section].items():
            assert read[section][name] == value, name
    training = TokenPruningTrainingArguments(**read["training"] | {"output_dir": "unused", "bf16": False})
    ours = ("kl_weight", "guidance_weight", "keep_rate_weight", "binarization_weight", "merge_entropy_weight")
    assert [getattr(training, name) for name in ours] == [0.0] * 5 and training.lora_r == 0
    assert training.loss_warmup == 0 and training.metric_for_best_model == "loss" and training.load_best_model_at_end
    assert read["merger"]["architecture"] == read["pruner"]["architecture"] == "documented"
    assert read["discriminator"]["layers"] == [-1, -3, -5]
    assert "keep_ratio" not in read["pruner"] and "keep_tokens" not in read["pruner"]


@pytest.mark.parametrize("script", ["train_token_pruning.py", "search_token_pruning.py"])
def test_help_shows_the_documented_names(monkeypatch, capsys, script):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, script, "--help")
    lines = capsys.readouterr().out.splitlines()
    for name, option in (
        ("method_settings.merge_ratio", "merge_ratio"),
        ("method_settings.temperature_min", "temperature_end"),
        ("trainer_settings.optimizers.discriminator.lr", "discriminator_learning_rate"),
        ("search_settings.n_trials", "trials"),
    ):
        assert any(line.startswith(f"  --{option} ") and name in line for line in lines), name


# ---------------------------------------------------------------------- the commands
@pytest.mark.parametrize("visible", [None, "1,2,3"])
def test_main_runs_as_typed(llava, tmp_path, monkeypatch, capsys, visible):
    """`python main.py`, and `CUDA_VISIBLE_DEVICES=1,2,3 python main.py`."""
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    os.symlink(llava, tmp_path / "outputs" / "small_vlm")
    smaller = ["--target_merge_tokens", 8, "--keep_tokens", 5, 3]
    run_script(monkeypatch, "train_token_pruning.py", *SMALL, *smaller)
    assert (tmp_path / "outputs" / "token_pruning" / "model.safetensors").is_file()
    assert "Creating Token Merger" in capsys.readouterr().out


def test_documented_configuration_runs(llava, tmp_path, monkeypatch, capsys):
    """The blocks of the quick start as one file: start messages, names in log and evaluation, files."""
    file, out = tmp_path / "vision_token_pruning.yaml", tmp_path / "outputs"
    documented = "  architecture: documented\n"
    ours = f"merger:\n{documented}pruner:\n{documented}  selection: threshold\nrun:\n  base_model: {llava}\n"
    saving = (
        "training:\n  save_steps: 2\n  eval_steps: 2\n  eval_strategy: steps\n  logging_steps: 1\n  save_parts: true\n"
    )
    best = "  load_best_model_at_end: true\n  metric_for_best_model: loss\n  report_to: tensorboard\n"
    file.write_text(TRAINING_SETTINGS + METHOD_SETTINGS + ours + saving + best)
    run_script(monkeypatch, "train_token_pruning.py", "--config", file, "--output_dir", out, *SMALL, *EIGHT)
    said = capsys.readouterr().out
    for line in (
        "Loading backbone and dataset...",
        "Freezing backbone parameters...",
        "Creating Trainer...",
        "Creating Token Merger...",
        "Creating Layer-Specific Pruners...",
        "Creating Discriminator...",
        "Starting training...",
        "Token Merger type: simple",
        "Merge Ratio: 0.5",
        "Pruning Layers: [10, 20, 31]",
        "Temperature: 1.0 → 0.1",
    ):
        assert f"[INFO] {line}" in said, line
    for part in ("token_merger", "layer_pruners", "discriminator"):
        assert (out / "checkpoints" / f"{part}_step_2.pt").is_file()
    log = (out / "logs" / "training.log").read_text()
    assert "[Step 1] loss:" in log and "disc_prob_real:" in log and "temperature:" in log
    assert list((out / "logs" / "tensorboard").glob("events.out.tfevents.*"))
    best_model = json.loads((out / "best.json").read_text())
    assert best_model["metric"] == "loss" and best_model["step"] == 2 and best_model["checkpoint"] == "checkpoint-2"
    # Going on from the documented parts, in a new folder.
    again = ["--config", file, "--output_dir", tmp_path / "again", "--init_from", out / "checkpoints", *SMALL, *EIGHT]
    run_script(monkeypatch, "train_token_pruning.py", *again, "--learning_rate", 0, "--report_to", "none")


def test_question_aware_merger_and_more_layers_run(llava, tmp_path, monkeypatch):
    file = tmp_path / "adjusted.yaml"
    settings = yaml.safe_load(TRAINING_SETTINGS + METHOD_SETTINGS)
    settings["method_settings"] |= {
        "merger_type": "question_aware", "merge_ratio": 0.6, "pruning_layers": [8, 12, 16, 20, 24, 28, 31],
        "task_loss_weight": 50.0, "adv_loss_weight": 2.0, "merge_sparsity_weight": "5e-4", "disc_reinit_prob": 0.1,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings | {"run": {"base_model": str(llava)}}))
    arguments = ["--config", file, "--output_dir", tmp_path / "out", *SMALL, "--pruner_d_internal", 8]
    run_script(monkeypatch, "train_token_pruning.py", *arguments, "--target_merge_tokens", 10)
    modes = json.loads((tmp_path / "out" / "results.json").read_text())["modes"]
    assert modes["merge_only"]["vision_tokens_per_layer"] == pytest.approx([10] * 32)


def test_search_runs_from_the_documented_switch(llava, tmp_path, monkeypatch, capsys):
    file = tmp_path / "search.yaml"
    file.write_text(SEARCH_SETTINGS + TRAINING_SETTINGS + METHOD_SETTINGS)
    arguments = ["--config", file, "--base_model", llava, "--output_dir", tmp_path / "search", *SMALL, *EIGHT]
    run_script(monkeypatch, "train_token_pruning.py", *arguments, "--n_trials", 2)
    best = json.loads((tmp_path / "search" / "best.json").read_text())
    assert best["trials"] == 2 and "merger_learning_rate" in best["parameters"]


def test_gpu_settings_run_without_a_gpu(llava, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = tmp_path / "gpus.yaml"
    file.write_text(GPU_SETTINGS + TRAINING_SETTINGS + METHOD_SETTINGS)
    arguments = ["--config", file, "--base_model", llava, "--output_dir", tmp_path / "out", *SMALL, *EIGHT]
    run_script(monkeypatch, "train_token_pruning.py", *arguments)
    assert "This machine has no CUDA device" in capsys.readouterr().out


def test_contradictions_are_named(llava, tmp_path, monkeypatch, capsys):
    base = ["--base_model", llava, "--output_dir", tmp_path / "out", *SMALL]
    for arguments, message in (
        (["--merge_ratio", 0.5, "--target_merge_tokens", 12], "keeps 8 of an image's 16 vision tokens, but target"),
        (["--n_trials", 3], "add --mode optuna"),
        (["--mode", "optuna", "--search", "false"], "contradict each other"),
        (["--mode", "grid"], "--mode is train or optuna"),
    ):
        with pytest.raises(SystemExit):
            run_script(monkeypatch, "train_token_pruning.py", *base, *arguments)
        assert message in capsys.readouterr().err
    assert not Path(tmp_path / "out" / "model.safetensors").exists()


def test_arguments_are_refused_before_a_small_model_is_trained(tmp_path, monkeypatch, capsys):
    missing = tmp_path / "vlm"
    arguments = ["--base_model", missing, "--output_dir", tmp_path / "out", "--temperature_anneal_rate", 1.5]
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "train_token_pruning.py", *arguments)
    assert "temperature_anneal_rate is a share between 0 and 1, got 1.5" in capsys.readouterr().err
    assert not missing.exists()
