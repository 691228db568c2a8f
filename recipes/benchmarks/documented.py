"""Compares the documented settings with this package's defaults: small models, the same data and steps.

    python recipes/benchmarks/documented.py                     # twenty minutes of one core
    python recipes/benchmarks/documented.py --only tokcom       # or vqgan, pruning, lfq

`documented` is `configs/paper` with smaller models, images and texts; every loss weight, learning rate, temperature and
schedule is unchanged. `default` is `configs/tiny` at the same size, batch and number of steps. One seed. Writes JSON and
prints one table.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import CPU, RECIPES, SMALL_INTERNVL, SMALL_VLM, SmallRunArguments, SmallRuns, read_json
from troubleshooting import PRUNING_DEFAULT, VQGAN_COLUMNS, VQGAN_SIZE

from tokcom_hf.cli import parse_recipe, run_recipe

CONFIGS = {"documented": "paper", "default": "tiny"}

TOKCOM_STEPS = {"vae": 150, "denoiser": 300}
TOKCOM_SIZE = (
    "--length", 128, "--tokenizer", "none", "--dataset_name", "none", "--dataset_config", "none",
    "--tokenizer_vocab_size", 1024, "--vae_training.max_steps", TOKCOM_STEPS["vae"],
    "--denoiser_training.max_steps", TOKCOM_STEPS["denoiser"], "--per_device_train_batch_size", 8, "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "false", "--early_stopping_patience", 0, "--sample_every", 0,
    "--report_to", "none", "--pt_checkpoints", "false", "--dataloader_num_workers", 0, "--threads", 1, *CPU,
)  # fmt: skip
TOKCOM_SHAPE = tuple(
    part
    for section in ("vae", "denoiser")
    for name, value in {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "intermediate_size": 512}.items()
    for part in (f"--{section}.{name}", value)
)  # fmt: skip
VQGAN_STEPS = 320
PRUNING_STEPS = 150
PRUNING_SIZE = (
    "--train_images", 2000, "--eval_questions", 300, "--max_steps", PRUNING_STEPS, "--batch_size", 12,
    "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--dtype", "float32",
    "--training.bf16", "false", "--prompt", "<image> {question}", "--threads", 1, *CPU,
)  # fmt: skip
# 16 vision tokens and 4 layers instead of 576 and 32.
PRUNING_DOCUMENTED = (
    "--target_merge_tokens", 8, "--pruning_layers", "[1, 2, 3]", "--pruner_d_internal", 32, "--merge_ratio", 0.5,
    "--save_parts", "false",
)  # fmt: skip
LFQ_STEPS = 150
LFQ_SIZE = (
    "--train_images", 1200, "--eval_images", 100, "--max_steps", LFQ_STEPS, "--per_device_train_batch_size", 8,
    "--output_dim", 10, "--quantizer.hidden_size", 96, "--quantizer.intermediate_size", 192,
    "--quantizer.num_hidden_layers", 2, "--quantizer.num_attention_heads", 4, "--eval_strategy", "no",
    "--save_strategy", "no", "--dtype", "float32", "--training.bf16", "false",
    "--gradient_checkpointing", "false", "--threads", 1, *CPU,
)  # fmt: skip
LFQ_PROMPTS = ("--prompt", "<image> {question}", "--caption_prompt", "{caption}")

# Rows of the table: section, label, result key, format.
ROWS = (
    ("tokcom", "TokCom: held-out token accuracy of the VAE", "token_accuracy", ".1%"),
    ("tokcom", "the same with noise of half a standard deviation", "token_accuracy_noise", ".1%"),
    ("tokcom", "perplexity of generated text, 5-gram Kneser-Ney of held-out text", "perplexity", ".0f"),
    ("tokcom", "entropy of generated tokens, nats (held-out text: see JSON)", "entropy", ".2f"),
    ("vqgan", "VQGAN: codes in use", "utilization", ".1%"),
    ("vqgan", "normalised entropy", "normalized_entropy", ".3f"),
    ("vqgan", "PSNR, dB", "psnr", ".2f"),
    ("pruning", "Pruning: accuracy without pruning", "accuracy_baseline", ".1%"),
    ("pruning", "accuracy, soft masks", "accuracy_soft", ".1%"),
    ("pruning", "accuracy, tokens really removed", "accuracy_hard", ".1%"),
    ("pruning", "vision tokens per layer, mean of 16", "vision_tokens", ".1f"),
    ("pruning", "FLOPs", "flops", ".1%"),
    ("lfq", "Joint LFQ: answers right without quantization", "teacher_accuracy", ".1%"),
    ("lfq", "answers right, quantized", "accuracy", ".1%"),
    ("lfq", "KL to the answers without quantization, nats", "quantized_kl", ".3f"),
    ("lfq", "probability of an image token where an answer starts", "lfq_mass_first", ".4f"),
    ("lfq", "generation loss below chance, nats per image token", "generation_gain", ".2f"),
)


def config(name: str, recipe: str) -> tuple:
    """The options that choose the configuration file `name` of a recipe."""
    return "--config", RECIPES / "configs" / CONFIGS[name] / f"{recipe}.yaml"


def tokcom(runs: SmallRuns, name: str) -> dict[str, Any]:
    """Trains a small TokCom with the settings `name`; returns its row."""
    own = TOKCOM_SHAPE if name == "documented" else ()
    folder = runs.train("train_tokcom", f"tokcom {name}", [*config(name, "train_tokcom"), *TOKCOM_SIZE, *own])
    results = read_json(folder)
    written = results["text"]["TokCom"]
    return {
        "token_accuracy": results["vae"]["token_accuracy"],
        "token_accuracy_noise": results["vae"]["token_accuracy_sigma_0.5"],
        "perplexity": written["kn_perplexity_held_out"],
        "entropy": written["entropy"],
        "entropy_held_out": results["text"]["held-out text"]["entropy"],
        "perplexity_held_out": results["text"]["held-out text"]["kn_perplexity_held_out"],
    }


def vqgan(runs: SmallRuns, name: str) -> dict[str, Any]:
    """Trains a small VQGAN with the settings `name`; returns its row."""
    size = [*VQGAN_SIZE, "--max_steps", VQGAN_STEPS, "--batch_size", 64]
    if name == "default":
        size += ["--training.autoencoder_steps", VQGAN_STEPS // 5]
    folder = runs.train("train_vqgan", f"documented vqgan {name}", [*config(name, "train_vqgan"), *size])
    return {key: read_json(folder)["metrics"][key] for key, _ in VQGAN_COLUMNS.values()}


def pruning(runs: SmallRuns, name: str) -> dict[str, Any]:
    """Trains merger and pruners of the small LLaVA with the settings `name`; returns their row."""
    own = PRUNING_DOCUMENTED if name == "documented" else PRUNING_DEFAULT
    base = ("--base_model", runs.base("pretrain_vlm", SMALL_VLM))
    command = [*config(name, "train_token_pruning"), *base, *PRUNING_SIZE, *own]
    modes = read_json(runs.train("train_token_pruning", f"documented pruning {name}", command))["modes"]
    per_layer = modes["hard"]["vision_tokens_per_layer"]
    return {
        "accuracy_baseline": modes["origin"]["accuracy"]["all"],
        "accuracy_soft": modes["soft"]["accuracy"]["all"],
        "accuracy_hard": modes["hard"]["accuracy"]["all"],
        "vision_tokens": sum(per_layer) / len(per_layer),
        "flops": modes["hard"]["flops_ratio"],
    }


def lfq(runs: SmallRuns, name: str) -> dict[str, Any]:
    """Trains the small InternVL to use LFQ tokens with the settings `name`; returns its row."""
    own = LFQ_PROMPTS if name == "documented" else ("--quantizer_start_steps", LFQ_STEPS * 2 // 5)
    base = ("--base", runs.base("pretrain_internvl", SMALL_INTERNVL))
    command = [*config(name, "train_joint_lfq"), *base, *LFQ_SIZE, *own]
    after = read_json(runs.train("train_joint_lfq", f"documented lfq {name}", command))["after"]
    names = ("teacher_accuracy", "accuracy", "quantized_kl", "lfq_mass_first")
    return {key: after[key] for key in names} | {
        "generation_gain": after["generation_chance"] - after["generation_loss"]
    }


SECTIONS = {"tokcom": tokcom, "vqgan": vqgan, "pruning": pruning, "lfq": lfq}


def summary(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of all sections that were measured."""
    lines = ["| | documented | default |", "|---|---:|---:|"]
    for section, label, key, style in ROWS:
        if section in results:
            cells = [format(results[section][name][key], style) for name in CONFIGS]
            lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Runs the sections, prints the table and returns the results."""
    values = parse_recipe(__doc__, {"run": SmallRunArguments}, None, argv)["run"]
    runs = SmallRuns(
        SmallRunArguments(**{"output": "outputs/benchmarks/small_runs/documented.json"} | values), list(SECTIONS)
    )
    torch.set_num_threads(1)
    for section in runs.sections:
        for name in CONFIGS:
            runs.row(section, name, lambda section=section, name=name: SECTIONS[section](runs, name))
    print(f"\n{summary(runs.results)}\n", flush=True)
    return runs.results


if __name__ == "__main__":
    run_recipe(main)
