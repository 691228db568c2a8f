"""TokCom's documented training configuration: every name acts, and configs/paper holds exactly these values."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.recipes import load
from tokcom_hf.cli import parse_recipe
from tokcom_hf.documented_names import TRAIN_TOKCOM

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "configs" / "paper" / "train_tokcom.yaml"
TRAIN_CONFIG = {
    "dataset_name": "wikitext-2-raw-v1", "tokenizer_path": "meta-llama/CodeLlama-7b-hf", "max_length": 1024,
    "chunk_size": 4, "batch_size": 8, "num_workers": 4, "vae_epochs": 5, "vae_lr": 1e-4, "diffusion_epochs": 10,
    "diffusion_lr": 3e-5, "noise_std": 0.05, "sample_every": 1, "num_sample_steps": 50, "num_samples": 2,
    "wandb_project": "TokCom-v5.2",
}  # fmt: skip
OTHERS = {
    "dataset_name": "wikitext-103-raw-v1", "tokenizer_path": "tokenizer", "max_length": 64, "chunk_size": 8,
    "batch_size": 3, "num_workers": 1, "vae_epochs": 2, "vae_lr": 2e-4, "diffusion_epochs": 3, "diffusion_lr": 4e-5,
    "noise_std": 0.2, "sample_every": 2, "num_sample_steps": 7, "num_samples": 5, "wandb_project": "mine",
}  # fmt: skip


@pytest.fixture(scope="module")
def training():
    return load("train_tokcom")


def settings_of(training, values) -> dict:
    """The objects that a run is made of."""

    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return 32016

    for section in ("vae_training", "denoiser_training", "distillation_training"):
        values[section] |= {"use_cpu": True}
    run, data = training.RunArguments(**values["run"]), SimpleNamespace(tokenizer=Tokenizer(eos_token_id=2), train=[])
    _, config, *_ = training.build_configs(values, run, SimpleNamespace(given=()), data)
    arguments = training.training_arguments(values, run)
    return {"run": run, "config": config, "vae": arguments["vae"], "diffusion": arguments["denoiser"]}


def as_documented(parts: dict) -> dict:
    """What a run's objects say of each documented name."""
    run, config, vae, diffusion = parts["run"], parts["config"], parts["vae"], parts["diffusion"]
    assert run.dataset_name == "Salesforce/wikitext" and vae.max_steps == diffusion.max_steps == -1
    shared = {
        "batch_size": "per_device_train_batch_size", "num_workers": "dataloader_num_workers", "sample_every": "sample_every",
        "num_samples": "num_samples", "wandb_project": "wandb_project",
    }  # fmt: skip
    assert all(getattr(vae, ours) == getattr(diffusion, ours) for ours in shared.values())
    assert vae.per_device_eval_batch_size == vae.per_device_train_batch_size
    return {name: getattr(vae, ours) for name, ours in shared.items()} | {
        "dataset_name": run.dataset_config, "tokenizer_path": run.tokenizer, "max_length": run.length,
        "chunk_size": config.vae.chunk_size, "noise_std": config.noise_std, "vae_epochs": vae.num_train_epochs,
        "vae_lr": vae.learning_rate, "diffusion_epochs": diffusion.num_train_epochs,
        "diffusion_lr": diffusion.learning_rate, "num_sample_steps": diffusion.sample_steps,
    }  # fmt: skip


@pytest.mark.parametrize("way", ["flags", "flags over paper", "file"])
def test_every_name_of_the_training_configuration_acts(training, tmp_path, way):
    config = PAPER if way == "flags over paper" else training.DEFAULT_CONFIG
    words = [word for name, value in OTHERS.items() for word in (f"--{name}", str(value))]
    if way == "file":
        # The names alone, as the document prints them; what they leave out is the default of each option.
        config, words = tmp_path / "config.yaml", []
        config.write_text(json.dumps(OTHERS))
    values = parse_recipe("", training.SECTIONS, config, words, TRAIN_TOKCOM)
    assert as_documented(settings_of(training, values)) == OTHERS


def test_the_paper_configuration_is_the_documented_one_value_by_value(training):
    values = parse_recipe("", training.SECTIONS, PAPER, [], TRAIN_TOKCOM)
    parts = settings_of(training, values)
    assert as_documented(parts) == TRAIN_CONFIG
    config = parts["config"]
    architecture = {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864,
    }  # fmt: skip
    for part in (config.vae, config.denoiser):
        assert {name: getattr(part, name) for name in architecture} == architecture
    assert config.vae.num_decoder_layers == 24 and config.max_chunks == 256 and config.num_steps == 50
    assert (config.time_distribution, config.mse_weight, config.cross_entropy_weight) == ("uniform", 0, 1)
    # Nothing that the document does not have.
    assert config.context is None and config.block_sizes == [0] and not config.clean_prefix
    assert not (config.standardize_latents or config.denoiser.self_conditioning)
    quiet = {"latent_noise", "token_dropout", "hint_tokens", "variational", "fixed_norm", "zero_init_residual"}
    assert not any(getattr(config.vae, name) for name in quiet)
    for arguments in (parts["vae"], parts["diffusion"]):
        assert arguments.ema_decay == arguments.muon_learning_rate == arguments.weight_decay == 0
        assert arguments.report_to == ["wandb"] and arguments.logging_steps == 1
        assert arguments.eval_strategy == arguments.save_strategy == "epoch" and arguments.load_best_model_at_end
    assert parts["vae"].random_chunks == 0 and str(parts["run"].output_dir) == "checkpoints"
    assert parts["run"].pt_checkpoints


def test_wikitext_is_known_by_the_names_of_its_configurations(training):
    run = training.RunArguments(dataset_name="wikitext-2-raw-v1")
    assert (run.dataset_name, run.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    with pytest.raises(ValueError, match="leave dataset_config out"):
        training.RunArguments(dataset_name="wikitext-2-raw-v1", dataset_config="wikitext-103-raw-v1")
