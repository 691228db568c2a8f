"""The improved VQ-VAE's commands and configurations, as they are documented: parsed, and run to their end."""

import ast
import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.recipes import load
from tokcom_hf import VQGAN, VQGANConfig, VQGANDiscriminator
from tokcom_hf.cli import RecipeError, parse_recipe
from tokcom_hf.data.images import procedural_scene
from tokcom_hf.documented_names import ANALYZE_CODEBOOK, TRAIN_VQGAN

ROOT = Path(__file__).parents[2]
TRAIN = """
  --train_dir /path/to/train/data \
  --val_dir /path/to/val/data \
  --image_size 256 \
  --in_channels 3 \
  --out_channels 3 \
  --model_dir ./models \
  --model_name vqgan_improved \
  --sample_dir ./samples \
  --epochs 100 \
  --early_stopping_patience 10 \
  --device cuda \
  --use_amp
"""
ANALYZE = """
  --model_path ./models/vqgan_improved.pt \
  --data_dir /path/to/val/data \
  --output_dir ./codebook_analysis \
  --image_size 256 \
  --batch_size 32 \
  --plot \
  --save_details \
  --temperature 1.0
"""
# The three documented blocks.
CODEBOOK_CONFIG = {"n_embed": 64, "embed_dim": 256, "ema_decay": 0.7, "commitment_loss_beta": 10.0}
TRAINER_CONFIG = {
    "entropy_weight": 2.0,
    "l1_weight": 0.7,
    "perceptual_weight": 0.005,
    "adversarial_weight": 0.4,
    "reset_low_usage_interval": 1,
    "reset_low_usage_percentage": 0.3,
}
TRAINING_STRATEGY = {
    "batch_size": 64,
    "temperature": 2.5,
    "codebook_init": "uniform",
    "commitment_warmup_epochs": 5,
    "reset_dead_codes_threshold": 1,
    "disable_codebook_expansion": True,
}
BLOCKS = {
    "CODEBOOK_CONFIG": CODEBOOK_CONFIG,
    "TRAINER_CONFIG": TRAINER_CONFIG,
    "TRAINING_STRATEGY": TRAINING_STRATEGY,
}
# What each documented value sets.
MEANS = {
    "model": {
        "codebook_size": 64,
        "codebook_dim": 256,
        "ema_decay": 0.7,
        "commitment_weight": 10.0,
        "entropy_weight": 2.0,
        "l1_weight": 0.7,
        "reset_interval": 0,
        "reset_fraction": 0.3,
        "temperature": 2.5,
        "codebook_init": "uniform",
        "dead_code_threshold": 1,
        "dead_code_unit": "count",
    },
    "training": {
        "perceptual_weight": 0.005,
        "adversarial_weight": 0.4,
        "reset_epochs": 1,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "temperature_schedule": "constant",
        "commitment_warmup_epochs": 5,
        "codebook_expansion": False,
    },
}
# A network and runs small enough for a test; nothing of these is documented.
SMALL = "--model.base_channels 8 --latent_channels 8 --codebook_dim 8 --discriminator.base_channels 8 --threads 1 "
SMALL += "--report_to none --disable_tqdm true --init_images 8 --num_pictures 2"


@pytest.fixture(scope="module")
def recipe():
    return load("train_vqgan")


@pytest.fixture(scope="module")
def analysis():
    return load("analyze_codebook")


def parse(recipe, text: str, config=None) -> dict:
    config = recipe.DEFAULT_CONFIG if config is None else config
    return parse_recipe(recipe.__doc__, recipe.SECTIONS, config, text.split(), TRAIN_VQGAN)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part, number in (("train", 12), ("val", 5)):
        (folder / part).mkdir()
        for index in range(number):
            procedural_scene(index + 1000 * len(part), 24).save(folder / part / f"{index}.png")
    return folder


def documented(command: str, folder: Path, **smaller: str) -> list[str]:
    """A documented command with its own paths inside `folder`, `cpu` for `cuda` and smaller sizes."""
    words = command.split()
    words = [str(folder / word[2:]) if word.startswith("./") else word for word in words]
    for flag, value in smaller.items():
        words[words.index(f"--{flag}") + 1] = value
    return words


# ---------------------------------------------------------------- the training command
@pytest.fixture
def pretend_cuda(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))


def test_every_flag_of_the_training_command_is_read(recipe, pretend_cuda):
    values = parse(recipe, TRAIN)
    run, training = values["run"], values["training"]
    assert run["image_dir"] == "/path/to/train/data" and run["val_dir"] == "/path/to/val/data"
    assert run["model_dir"] == "./models" and run["model_name"] == "vqgan_improved"
    assert Path(recipe.RunArguments(**run).output_dir) == Path("models/vqgan_improved")
    assert {name: values["model"][name] for name in ("image_size", "in_channels", "out_channels")} == {
        "image_size": 256, "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    assert training["num_train_epochs"] == 100 and training["max_steps"] == -1
    assert training["eval_strategy"] == training["save_strategy"] == "epoch"
    assert training["early_stopping_patience"] == 10 and training["sample_dir"] == "./samples"
    assert training["use_cpu"] is False and training["bf16"] is True


def test_cuda_without_cuda_is_one_sentence(recipe, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(RecipeError, match=r"^--device: .*no device 'cuda'.*--device cpu\.$"):
        parse(recipe, "--device cuda")
    assert parse(recipe, "--device cpu")["training"]["use_cpu"] is True


def test_a_second_device_is_not_silently_the_first(recipe, pretend_cuda):
    with pytest.raises(RecipeError, match="first device"):
        parse(recipe, "--device cuda:1")


def test_in_channels_are_the_models_alone(recipe):
    values = parse(recipe, "--in_channels 1 --out_channels 3")
    assert values["model"]["in_channels"] == 1 and "in_channels" not in values["discriminator"]
    assert "documented: --train_dir" in help_of(recipe)


def help_of(recipe) -> str:
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        parse(recipe, "--help")
    return shown.getvalue()


@pytest.fixture(scope="module")
def trained(recipe, data, tmp_path_factory) -> Path:
    """The documented training command, run to its end: paths, sizes and the device are smaller, nothing else differs."""
    folder = tmp_path_factory.mktemp("documented")
    command = documented(
        TRAIN,
        folder,
        train_dir=str(data / "train"),
        val_dir=str(data / "val"),
        image_size="16",
        epochs="4",
        device="cpu",
    )
    recipe.main([*command, *SMALL.split()])
    return folder


def test_the_training_command_leaves_its_model_where_it_says(trained):
    output = trained / "models" / "vqgan_improved"
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 4 and results["held_out_images"] == 5 and results["train_images"] == 12
    model = VQGAN.from_pretrained(output)
    assert model.config.in_channels == model.config.out_channels == 3
    assert "quantizer.codebook" in load_file(output / "model.safetensors")
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [row["epoch"] for row in history if "eval_psnr" in row] == [1, 2, 3, 4]


def test_samples_of_every_epoch_are_in_the_sample_folder(trained):
    names = sorted(path.name for path in (trained / "samples").iterdir())
    assert names == [f"epoch-{epoch}-reconstructions.png" for epoch in (1, 2, 3, 4)]
    assert Image.open(trained / "samples" / names[-1]).size[0] > 16


SIX = (
    "cumulative_active", "batch_utilization", "batch_entropy", "batch_normalized_entropy", "cumulative_entropy",
    "cumulative_normalized_entropy",
)  # fmt: skip


def test_the_six_metrics_are_in_every_evaluation_and_log(trained):
    output = trained / "models" / "vqgan_improved"
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    evaluations = [row for row in state if "eval_psnr" in row]
    assert len(evaluations) == 4
    for row in evaluations:
        assert {f"eval_{name}" for name in SIX} <= set(row)
        assert (
            0 < row["eval_batch_utilization"] <= 1 and row["eval_batch_active"] == 64 * row["eval_batch_utilization"]
        )
        assert 0 <= row["eval_batch_normalized_entropy"] <= 1 and row["eval_cumulative_active"] >= (row["epoch"] > 1)
    text = (output / "logs" / "training.log").read_text()
    assert all(f"eval_{name}: " in text for name in SIX)
    metrics = json.loads((output / "results.json").read_text())["metrics"]
    assert set(SIX) <= set(metrics)


# ---------------------------------------------------------------- the analysis command
def test_the_analysis_command_runs_to_its_end(analysis, trained, data):
    command = documented(ANALYZE, trained, data_dir=str(data / "val"), image_size="16", batch_size="2")
    arguments = parse_recipe("", {"analysis": analysis.AnalysisArguments}, None, ANALYZE.split(), ANALYZE_CODEBOOK)
    assert arguments["analysis"] == {
        "model_path": "./models/vqgan_improved.pt", "data_dir": "/path/to/val/data", "output_dir": "./codebook_analysis",
        "image_size": 256, "batch_size": 32, "plot": True, "save_details": True, "temperature": 1.0,
    }  # fmt: skip
    summary = analysis.main(command)
    output = trained / "codebook_analysis"
    assert summary["images"] == 5 and summary["codes_seen"] == 5 * 4 and summary["codebook_size"] == 64
    assert summary["sampled"]["temperature"] == 1.0 and summary["sampled"]["active"] >= 1
    assert {"usage.png", "codes.png", "reconstructions.png", "codes.csv", "summary.json"} <= {
        path.name for path in output.iterdir()
    }
    rows = list(csv.DictReader((output / "codes.csv").open()))
    assert len(rows) == 64 and sum(int(row["count"]) for row in rows) == 20
    assert json.loads((output / "summary.json").read_text()) == summary


def test_analysis_flags_act(analysis, trained, data, tmp_path):
    common = ["--model_path", str(trained / "models" / "vqgan_improved"), "--data_dir", str(data / "val")]
    # Another size shows more codes, another batch none; without --plot and --save_details only the summary is written.
    larger = analysis.main(
        [*common, "--image_size", "32", "--batch_size", "3", "--device", "cpu", "--output_dir", str(tmp_path / "a")]
    )
    assert larger["codes_seen"] == 5 * 16 and "sampled" not in larger
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["summary.json"]
    hot = analysis.main([*common, "--temperature", "1000", "--output_dir", str(tmp_path / "b")])
    cold = analysis.main([*common, "--temperature", "1e-6", "--output_dir", str(tmp_path / "c")])
    assert hot["sampled"]["entropy"] > cold["sampled"]["entropy"]
    assert cold["sampled"]["active"] == cold["active"]
    with pytest.raises(ValueError, match=r"'nonsense' cannot be used here; give --device cpu"):
        analysis.main([*common, "--device", "nonsense", "--output_dir", str(tmp_path / "d")])


def test_a_weights_file_is_not_taken_for_a_folder(analysis, tmp_path):
    with pytest.raises(FileNotFoundError, match="needs a folder"):
        analysis.model_folder(str(tmp_path / "none.pt"))
    (tmp_path / "some.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match="file of weights"):
        analysis.model_folder(str(tmp_path / "some.pt"))


# ---------------------------------------------------------------- the configuration blocks
def test_every_value_of_the_blocks_is_accepted_in_a_yaml_file(recipe, tmp_path):
    path = tmp_path / "documented.yaml"
    lines = []
    for block, values in BLOCKS.items():
        lines += [f"{block}:", *(f"  {name}: {value}" for name, value in values.items())]
    path.write_text("\n".join(lines))
    values = parse(recipe, f"--config {path}")
    assert {section: values[section] for section in MEANS} == MEANS


@pytest.mark.parametrize("block", BLOCKS)
def test_every_value_of_the_blocks_is_a_flag(recipe, block):
    flags = " ".join(f"--{name} {value}" for name, value in BLOCKS[block].items())
    values = parse(recipe, flags)
    single = [parse(recipe, f"--{name} {value}") for name, value in BLOCKS[block].items()]
    default = parse(recipe, "")
    for section, wanted in MEANS.items():
        changed = {
            name: one[section][name]
            for one in single
            for name in one[section]
            if one[section].get(name) != default[section].get(name)
        }
        assert changed.items() <= wanted.items()
        assert all(values[section][name] == value for name, value in changed.items())
    # The average of the weights, which a run has beside the codes' own, keeps its decay.
    assert values["training"]["ema_decay"] == default["training"]["ema_decay"]


def test_the_paper_configuration_holds_the_documented_values(recipe):
    values = parse(recipe, "", ROOT / "recipes" / "configs" / "paper" / "train_vqgan.yaml")
    for section, wanted in MEANS.items():
        # The discriminator, the epochs and the patience of the command.
        assert {name: values[section].get(name) for name in wanted} == wanted
    training, model = values["training"], values["model"]
    assert training["num_train_epochs"] == 100 and training["early_stopping_patience"] == 10 and training["bf16"]
    assert model["image_size"] == 256 and model["downsample_factor"] == 8
    assert VQGANConfig(**model).in_channels == VQGANConfig(**model).out_channels == 3


def test_the_documented_blocks_train(recipe, data, tmp_path):
    blocks = [
        word for values in BLOCKS.values() for name, value in values.items() for word in (f"--{name}", str(value))
    ]
    command = ["--train_dir", str(data / "train"), "--epochs", "2", "--device", "cpu", "--image_size", "16"]
    small = SMALL.replace("--codebook_dim 8 ", "").split()
    output = tmp_path / "run"
    results = recipe.main([*blocks, *command, *small, "--output_dir", str(output)])
    assert results["steps"] == 2 and 0 < results["metrics"]["utilization"] <= 1
    config = VQGAN.from_pretrained(output).config
    assert (config.codebook_size, config.codebook_dim, config.ema_decay) == (64, 256, 0.7)


def test_troubleshooting_values_are_accepted(recipe):
    values = parse(
        recipe, "--temperature 3.0 --ema_decay 0.5 --n_embed 32 --batch_size 128 --codebook_diversity_loss 0.1"
    )
    model, training = values["model"], values["training"]
    assert model["temperature"] == 3.0 and model["ema_decay"] == 0.5 and model["codebook_size"] == 32
    assert training["per_device_train_batch_size"] == 128 and model["diversity_weight"] == 0.1


# ---------------------------------------------------------------- channels and held-out images
@pytest.mark.parametrize(("into", "out"), [(1, 3), (3, 1), (1, 1)])
def test_channels_in_and_out_may_differ(recipe, analysis, data, tmp_path, into, out):
    command = ["--train_dir", str(data / "train"), "--image_size", "16", "--device", "cpu", "--epochs", "2"]
    command += ["--in_channels", str(into), "--out_channels", str(out), "--output_dir", str(tmp_path / "run")]
    command += ["--perceptual", "random", "--adversarial_start", "0", *SMALL.split()]
    results = recipe.main(command)
    assert results["metrics"]["psnr"] > 0
    model = VQGAN.from_pretrained(tmp_path / "run")
    assert (model.config.in_channels, model.config.out_channels) == (into, out)
    assert VQGANDiscriminator.from_pretrained(tmp_path / "run" / "discriminator").config.in_channels == out
    summary = analysis.main(
        [
            "--model_path",
            str(tmp_path / "run"),
            "--data_dir",
            str(data / "val"),
            "--output_dir",
            str(tmp_path / "seen"),
        ]
    )
    assert summary["images"] == 5


def test_a_discriminator_of_other_channels_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="out_channels, got 1"):
        recipe.main(["--discriminator.in_channels", "1", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])


def test_held_out_folder_must_be_another(recipe, data, tmp_path):
    with pytest.raises(ValueError, match="share images"):
        recipe.main(["--train_dir", str(data), "--val_dir", str(data / "val"), "--output_dir", str(tmp_path / "run")])


def test_two_names_for_the_output_folder_are_refused(recipe):
    with pytest.raises(ValueError, match="give one of them"):
        recipe.RunArguments(output_dir="here", model_dir="there")
    assert Path(recipe.RunArguments(model_name="mine").output_dir) == Path("outputs/mine")


def test_documented_names_mean_options_of_their_recipe(recipe):
    tree = ast.parse((ROOT / "recipes" / "train_vqgan.py").read_text())
    assert any(isinstance(node, ast.Name) and node.id == "TRAIN_VQGAN" for node in ast.walk(tree))
    shown = help_of(recipe)
    for name in ("--epochs", "--use_amp", "CODEBOOK_CONFIG.n_embed", "TRAINER_CONFIG.l1_weight"):
        assert name in shown


def test_training_and_analysis_count_the_same(recipe, analysis, data, tmp_path):
    # In float32: mixed precision moves features across the borders between codes.
    output, held_out = str(tmp_path / "run"), str(data / "val")
    command = ["--train_dir", str(data / "train"), "--val_dir", held_out, "--image_size", "16", "--epochs", "2"]
    metrics = recipe.main([*command, "--device", "cpu", "--output_dir", output, *SMALL.split()])["metrics"]
    summary = analysis.main(
        ["--model_path", output, "--data_dir", held_out, "--output_dir", str(tmp_path / "seen"), "--device", "cpu"]
    )
    for name in ("active", "utilization", "entropy", "normalized_entropy", "perplexity"):
        assert summary[name] == pytest.approx(metrics[name])
    assert summary["psnr"] == pytest.approx(metrics["psnr"], abs=1e-3)
