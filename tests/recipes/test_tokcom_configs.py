"""Every configuration of recipes/train_tokcom.py builds its models and training arguments."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*/train_tokcom.yaml"))


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("train_tokcom_recipe", ROOT / "recipes" / "train_tokcom.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_configuration_builds_its_models(recipe, tmp_path, path):
    values = recipe.parse_recipe("", recipe.SECTIONS, path, [])
    run = recipe.RunArguments(**values["run"])
    vae = recipe.TokComVAEConfig(**values["vae"])
    denoiser = recipe.DenoisedModelConfig(**values["denoiser"] | {"latent_size": vae.latent_size})
    config = recipe.TokComConfig(vae=vae, denoiser=denoiser, **values["flow"])
    with torch.device("meta"):
        model = recipe.TokComModel(config)
    assert run.length % vae.chunk_size == 0 and sum(p.numel() for p in model.parameters()) > 1e6
    anywhere = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for name, arguments in (
        ("vae_training", recipe.TokComVAETrainingArguments),
        ("denoiser_training", recipe.DenoiserTrainingArguments),
    ):
        assert arguments(**values[name] | anywhere).learning_rate > 0


def test_all_sizes_are_there():
    assert {path.parent.name for path in CONFIGS} >= {"tiny", "small", "latent", "base", "paper"}
