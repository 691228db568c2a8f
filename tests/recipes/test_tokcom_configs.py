"""Every configuration of recipes/train_tokcom.py builds its models and trains them; `paper` is the documented system."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.recipes import load

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*/train_tokcom.yaml"))
# Sizes at which a step takes milliseconds; all other values stay those of the file.
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
TRAINING = ("vae_training", "denoiser_training", "distillation_training")


@pytest.fixture(scope="module")
def recipe():
    return load("train_tokcom")


@pytest.fixture(params=CONFIGS, ids=lambda path: path.parent.name)
def values(request, recipe):
    return recipe.parse_recipe("", recipe.SECTIONS, request.param, ["--run.output_dir", "unused"])


def data_of(tokens: int, length: int):
    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return tokens

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tokens, (4, length), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return SimpleNamespace(tokenizer=Tokenizer(eos_token_id=0), train=rows, validation=rows)


def test_every_configuration_builds_its_models(recipe, values, tmp_path):
    run, data = recipe.RunArguments(**values["run"]), data_of(values["run"].get("tokenizer_vocab_size", 32016), 8)
    for name in TRAINING:
        values[name] |= {"use_cpu": True, "bf16": False}
    vae, config, *_ = recipe.build_configs(values, run, SimpleNamespace(given=()), data)
    arguments = recipe.training_arguments(values, run)
    with torch.device("meta"):
        model = recipe.TokComModel(config)
    assert run.length % vae.chunk_size == 0 and model.num_parameters() > 1e6
    assert arguments["vae"].learning_rate > 0 and arguments["denoiser"].learning_rate > 0
    if values["context"]:
        # What a chunk becomes is smaller than what a table of embeddings would need.
        assert vae.latent_size <= 128 and vae.chunk_size == 4
        assert arguments["distilled"].student_steps in (1, 2)


def test_every_configuration_trains_each_stage(recipe, values, tmp_path):
    values["run"] |= {"output_dir": str(tmp_path), "length": 64, "threads": 1}
    documented = not values["context"]
    for part in ("vae", "denoiser") + (() if documented else ("context",)):
        values[part] |= SHAPE
    if not documented:
        values["vae"]["latent_size"] = 16
    for name in TRAINING:
        values[name] |= {
            "max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
            "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0,
            "sample_every": 0, "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0,
            "gradient_accumulation_steps": 1,
        }  # fmt: skip
    run, data = recipe.RunArguments(**values["run"]), data_of(50, 64)
    vae_config, config, *_ = recipe.build_configs(values, run, SimpleNamespace(given=()), data)
    arguments = recipe.training_arguments(values, run)
    vae = recipe.TokComVAE(vae_config)
    model = recipe.TokComModel(config)
    model.vae = vae
    builders = [
        lambda: recipe.TokComVAETrainer(vae, arguments["vae"], train_dataset=data.train),
        lambda: recipe.DenoiserTrainer(model, arguments["denoiser"], train_dataset=data.train),
    ]
    if not documented:
        distillation = {"args": arguments["distilled"], "teacher": model}
        builders.append(lambda: recipe.DistillationTrainer(**distillation, train_dataset=data.train))
    for build in builders:
        trainer = build()
        before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
        trainer.train()
        assert trainer.state.global_step == 3
        still = [
            name
            for name, value in trainer.model.named_parameters()
            if name in before and torch.equal(value, before[name])
        ]
        # A block of one chunk has nothing to choose between.
        assert [name for name in still if "q_proj" not in name and "k_proj" not in name] == []


def test_all_sizes_are_there_and_the_default_is_tiny(recipe):
    assert {path.parent.name for path in CONFIGS} >= {"tiny", "small", "base", "paper"}
    assert recipe.DEFAULT_CONFIG == ROOT / "recipes" / "configs" / "tiny" / "train_tokcom.yaml"


def test_the_configurations_defaults_and_paper_are_the_documented_system(recipe):
    values = recipe.parse_recipe("", recipe.SECTIONS, ROOT / "recipes" / "configs" / "paper" / "train_tokcom.yaml", [])
    assert values["vae"] == values["denoiser"] == values["context"] == values["flow"] == {}
    run = recipe.RunArguments(**values["run"])
    assert (run.tokenizer, run.length) == ("meta-llama/CodeLlama-7b-hf", 1024)
    assert (run.dataset_name, run.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    _, config, *_ = recipe.build_configs(values, run, SimpleNamespace(given=()), data_of(32016, 8))
    shape = {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "latent_size": 896,
    }  # fmt: skip
    for part in (config.vae, config.denoiser):
        assert {name: getattr(part, name) for name in shape} == shape
    vae = {"vocab_size": 32017, "omni_token_id": 32016, "chunk_size": 4, "chunk_projection": "last", "variational": False,
           "fixed_norm": False, "latent_noise": 0.0, "num_decoder_layers": 24, "tie_word_embeddings": True}  # fmt: skip
    assert {name: getattr(config.vae, name) for name in vae} == vae
    assert config.denoiser.time_scale == 1 and config.denoiser.context_size is None
    flow = {"context": None, "standardize_latents": False, "noise_std": 0.05, "time_distribution": "uniform",
            "mse_weight": 0.0, "cross_entropy_weight": 1.0, "clean_prefix": False, "max_chunks": 256, "num_steps": 50,
            "step_power": 1.0, "sampler": "euler", "block_size": 0}  # fmt: skip
    assert {name: getattr(config, name) for name in flow} == flow
    stages = {"vae_training": (5, 1e-4), "denoiser_training": (10, 3e-5)}
    for name, (epochs, rate) in stages.items():
        section = values[name]
        assert (section["num_train_epochs"], section["learning_rate"], section["lr_scheduler_type"]) == (
            epochs, rate, "constant",
        )  # fmt: skip
        assert section["per_device_train_batch_size"] == 8 and section["load_best_model_at_end"] is True
