"""recipes/train_ar_baseline.py on its own: explicit budgets, learning, padding, resume."""

import json
import random
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.helpers.recipes import call
from tokcom_hf.metrics.compute import matching_llama_config

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "train_ar_baseline.py"
WORDS = [
    "the",
    "a",
    "quick",
    "brown",
    "fox",
    "dog",
    "jumps",
    "over",
    "runs",
    "under",
    "lazy",
    "red",
    "old",
    "new",
    "house",
]
SMALL = ["--parameters", "40000", "--head_dim", "16", "--num_layers", "1", "--length", "16", "--tokenizer_vocab_size", "300",
         "--per_device_train_batch_size", "8", "--use_cpu", "true", "--warmup_steps", "2",
         "--learning_rate", "1e-2", "--save_steps", "20", "--save_total_limit", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n\n\n".join(" ".join(generator.choice(WORDS) for _ in range(40)) for _ in range(100)))
    return file


@pytest.mark.slow
def test_it_learns_within_an_explicit_budget_and_resumes_to_the_same_weights(tmp_path, corpus):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = [*SMALL, "--train_file", corpus, "--tokens", 30 * 8 * 16]
    call("train_ar_baseline", *common, "--output_dir", whole)
    budget = json.loads((whole / "budget.json").read_text())
    assert budget["steps"] == 30 and budget["tokens"] == 30 * 8 * 16 and budget["matched"] is None
    assert budget["parameters"] == pytest.approx(40_000, rel=0.02)
    # Guessing uniformly costs ln 300 = 5.7 nats, knowing the 15 words 2.7 a word and less a token.
    assert budget["held_out_loss"] < 4.5

    call("train_ar_baseline", *common, "--output_dir", broken)
    shutil.rmtree(broken / "checkpoint-30")
    (broken / "model.safetensors").unlink()
    call("train_ar_baseline", *common, "--output_dir", broken, "--resume_from_checkpoint", "true")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(FileExistsError, match="is not empty"):
        call("train_ar_baseline", *common, "--output_dir", whole)


@pytest.mark.slow
def test_the_logged_loss_is_nats_per_token_whatever_the_accumulation(tmp_path):
    recipe = runpy.run_path(str(RECIPE), run_name="recipe")
    rows = [{"input_ids": torch.randint(50, (12,)), "attention_mask": torch.ones(12, dtype=torch.long)}] * 4
    logged, weights = [], []
    for batch, accumulated in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(matching_llama_config(30_000, 50, num_layers=1, head_dim=16))
        arguments = recipe["CompressionTrainingArguments"](
            output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=batch, max_steps=1,
            gradient_accumulation_steps=accumulated, logging_steps=1, save_strategy="no", optim="sgd", learning_rate=0.1,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = recipe["CausalTrainer"](model=model, args=arguments, train_dataset=rows)
        trainer.train()
        logged.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        weights.append(model.model.norm.weight.detach().clone())
    # An untrained model guesses: ln 50 = 3.9 nats.
    assert logged[0] == pytest.approx(logged[1], rel=1e-3) and 3.5 < logged[0] < 4.5
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


def test_padding_is_not_part_of_the_loss(tmp_path):
    recipe = runpy.run_path(str(RECIPE), run_name="recipe")
    model = LlamaForCausalLM(matching_llama_config(30_000, 50, num_layers=1, head_dim=16)).eval()
    arguments = recipe["CompressionTrainingArguments"](output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = recipe["CausalTrainer"](model=model, args=arguments)
    ids = torch.randint(50, (1, 12))
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (0, 4), value=7)
    padded_mask = torch.nn.functional.pad(mask, (0, 4))
    plain = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": mask})
    with_padding = trainer.compute_loss(model, {"input_ids": padded, "attention_mask": padded_mask})
    assert plain.item() == pytest.approx(with_padding.item(), rel=1e-5)
