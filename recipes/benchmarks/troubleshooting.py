"""Tries each piece of troubleshooting advice in the documents once, at a small size, and shows what it changes.

    python recipes/benchmarks/troubleshooting.py                  # a quarter of an hour of one core
    python recipes/benchmarks/troubleshooting.py --only vqgan     # or pruning, memory, lfq

One seed; the rows of a section share data and steps. `vqgan`: images of 16 pixels, with settings under which the codebook
collapses, with the documented and with the default ones. `pruning`: the small LLaVA (16 vision tokens), documented losses
at the default's learning rates. `memory`: one training step of a small untrained Qwen2-VL on images of 1120 pixels. `lfq`:
what the documented functions return or raise for each of the three mistakes. Writes the JSON that `docs/troubleshooting.md`
quotes.
"""

import concurrent.futures
import multiprocessing
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import CPU, RECIPES, SMALL_VLM, SmallRunArguments, SmallRuns, logged, read_json, table
from training_memory import memory_step

from tokcom_hf import (
    decode_tokens_to_lfq_codes,
    encode_lfq_codes_to_tokens,
    expand_vocab_for_lfq,
    get_lfq_token_range,
)
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.small_models.small_internvl import build_small_internvl

# ---------------------------------------------------------------------------------------------------------------- VQGAN
VQGAN_SIZE = (
    "--model.image_size", 16, "--model.patch_size", 2, "--model.downsample_factor", 4, "--model.base_channels", 16,
    "--model.channel_multipliers", 1, 2, "--model.num_res_blocks", 1, "--model.mid_attention", "false",
    "--discriminator.base_channels", 8, "--discriminator.num_layers", 2, "--training.bf16", "false", "--num_train", 512,
    "--num_eval", 256, "--dataloader_num_workers", 0, "--eval_strategy", "no", "--save_strategy", "no",
    "--load_best_model_at_end", "false", "--early_stopping_patience", 0, "--num_pictures", 4, "--threads", 1, *CPU,
)  # fmt: skip
VQGAN_STEPS = 160
# The settings that the document describes before its remedies.
BEFORE_REMEDIES = (
    "--n_embed", 512, "--CODEBOOK_CONFIG.ema_decay", 0.85, "--TRAINING_STRATEGY.temperature", 1.2,
    "--TRAINER_CONFIG.entropy_weight", 1.0, "--reset_low_usage_percentage", 0.0,
)  # fmt: skip
# Also without temperature and entropy loss, at the default's learning rate: the collapse that the advice is for.
COLLAPSING = (
    *BEFORE_REMEDIES, "--TRAINING_STRATEGY.temperature", 0.0, "--TRAINER_CONFIG.entropy_weight", 0.0,
    "--learning_rate", 2e-3,
)  # fmt: skip
# As in the default, where 120 of 600 steps are without quantization.
VQGAN_BASES = {
    "collapsing": ("paper", COLLAPSING),
    "documented": ("paper", ()),
    "default": ("tiny", ("--batch_size", 64, "--training.autoencoder_steps", VQGAN_STEPS // 5)),
}
VQGAN_TIPS = {
    "as it is": (),
    "temperature 3.0": ("--TRAINING_STRATEGY.temperature", 3.0),
    "EMA decay 0.5": ("--CODEBOOK_CONFIG.ema_decay", 0.5),
    "32 codes": ("--n_embed", 32),
    "batch of 128": ("--batch_size", 128),
    "diversity loss 1.0": ("--codebook_diversity_loss", 1.0),
}
VQGAN_COLUMNS = {
    "utilisation %": ("utilization", ".1%"), "normalised entropy": ("normalized_entropy", ".3f"), "PSNR dB": ("psnr", ".2f"),
}  # fmt: skip


def vqgan_run(runs: SmallRuns, name: str, config: str, arguments) -> dict:
    """Trains a small VQGAN; returns its metrics."""
    file = RECIPES / "configs" / config / "train_vqgan.yaml"
    folder = runs.train(
        "train_vqgan", f"vqgan {name}", ["--config", file, *VQGAN_SIZE, "--max_steps", VQGAN_STEPS, *arguments]
    )
    metrics = read_json(folder)["metrics"]
    return {key: metrics[key] for key, _ in VQGAN_COLUMNS.values()}


def vqgan(runs: SmallRuns) -> str:
    """The table of the VQGAN advice."""

    def row(name: str, config: str, arguments) -> dict:
        return runs.row("vqgan", name, lambda: vqgan_run(runs, name, config, arguments))

    rows = {"before the remedies": row("before the remedies", "paper", BEFORE_REMEDIES)}
    for base, (config, settings) in VQGAN_BASES.items():
        for tip, arguments in VQGAN_TIPS.items():
            name = f"{base}, {tip}"
            rows[name] = row(name, config, (*settings, *arguments))
    return table(rows, VQGAN_COLUMNS, "VQGAN")


# -------------------------------------------------------------------------------------------------------------- pruning
PRUNING_STEPS = 100
PRUNING_SIZE = (
    "--train_images", 1500, "--eval_questions", 200, "--max_steps", PRUNING_STEPS, "--eval_strategy", "steps",
    "--eval_steps", PRUNING_STEPS, "--save_strategy", "no", "--logging_steps", 10, "--threads", 1, *CPU,
)  # fmt: skip
# The same share of 16 vision tokens that the default keeps of 64.
PRUNING_DEFAULT = ("--target_merge_tokens", 5, "--keep_tokens", "[3, 2]")
PRUNING_DOCUMENTED = (
    "--batch_size", 12, "--target_merge_tokens", "none", "--merge_ratio", 0.5, "--pruning_layers", "[1, 2, 3]",
    "--keep_tokens", "none", "--keep_ratio", 0.5, "--lora_r", 0, "--task_loss_weight", 25.0, "--adv_loss_weight", 1.0,
    "--merge_sparsity_weight", 1e-4, "--merge_entropy_weight", 0.0, "--kl_weight", 0.0, "--guidance_weight", 0.0,
    "--keep_rate_weight", 0.0, "--binarization_weight", 0.0, "--temperature", 1.0, "--temperature_min", 0.1,
    "--temperature_anneal_rate", 0.5,
)  # fmt: skip
PRUNING_TIPS = {
    "documented losses": (),
    "merge_ratio 0.6": ("--merge_ratio", 0.6),
    "merge_ratio 0.4": ("--merge_ratio", 0.4),
    "merge_sparsity_weight 1e-3": ("--merge_sparsity_weight", 1e-3),
    "task_loss_weight 50": ("--task_loss_weight", 50.0),
    "adv_loss_weight 0.5": ("--adv_loss_weight", 0.5),
    "adv_loss_weight 2.0": ("--adv_loss_weight", 2.0),
    "discriminator lr 2e-4": ("--trainer_settings.optimizers.discriminator.lr", 2e-4),
    "disc_reinit_prob 0.1": ("--disc_reinit_prob", 0.1),
    "temperature_anneal_rate 1.0": ("--temperature_anneal_rate", 1.0),
}
PRUNING_COLUMNS = {
    "accuracy_baseline": ("accuracy_baseline", ".3f"), "accuracy_soft": ("accuracy_soft", ".3f"),
    "accuracy_hard": ("accuracy_hard", ".3f"), "avg_merged_tokens": ("avg_merged_tokens", ".1f"),
    "disc_prob_real": ("disc_prob_real", ".3f"), "disc_prob_fake": ("disc_prob_fake", ".3f"),
    "temperature, first": ("temperature_first", ".2f"), "last": ("temperature_last", ".2f"),
}  # fmt: skip


def pruning_run(runs: SmallRuns, name: str, arguments) -> dict:
    """Trains merger and pruners of the small LLaVA; returns their metrics and temperatures."""
    base = runs.base("pretrain_vlm", SMALL_VLM)
    command = ["--base_model", base, *PRUNING_SIZE, *arguments]
    folder = runs.train("train_token_pruning", f"pruning {name}", command)
    row: dict = {}
    for key, _ in PRUNING_COLUMNS.values():
        values = logged(folder, f"eval_{key}")
        row[key] = values[-1] if values else None
    temperatures = logged(folder, "pruning/temperature")
    return row | {"temperature_first": temperatures[0], "temperature_last": temperatures[-1]}


def pruning(runs: SmallRuns) -> str:
    """The table of the pruning advice."""

    def row(name: str, arguments) -> dict:
        return runs.row("pruning", name, lambda: pruning_run(runs, name, arguments))

    rows = {"default": row("default", PRUNING_DEFAULT)}
    rows |= {name: row(name, (*PRUNING_DOCUMENTED, *arguments)) for name, arguments in PRUNING_TIPS.items()}
    return table(rows, PRUNING_COLUMNS, "token pruning")


# --------------------------------------------------------------------------------------------------------------- memory
MEMORY_TIPS = {
    "as it is": {},
    "batch_size 6": {"batch": 6},
    "max_vision_tokens 1200": {"max_vision_tokens": 1200},
    "image_max_size 800": {"image_max_size": 800},
}
MEMORY_COLUMNS = {"images": ("batch", "d"), "vision tokens each": ("tokens", "d"), "peak MiB": ("peak_mib", ".0f")}


def memory_run(tip: dict) -> dict:
    """Measures one training step in a new process."""
    # A new process, because memory that an earlier step freed would distort the peak.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(memory_step, **tip).result()


def memory(runs: SmallRuns) -> str:
    """The table of the advice against a lack of memory."""
    rows = {}
    for name, tip in MEMORY_TIPS.items():
        rows[name] = runs.row("memory", name, lambda tip=tip: memory_run(tip))
    return table(rows, MEMORY_COLUMNS, "one training step")


# ------------------------------------------------------------------------------------------------------------------ LFQ
LFQ_COLUMNS = {"codes that come back": ("share", ".1%"), "answer": ("answer", "s")}


def result_or_error(call) -> str:
    """What `call` returns, or the error that it raises, as text."""
    try:
        return str(call())
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def lfq(runs: SmallRuns) -> str:
    """The table of the LFQ advice."""
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    base, _ = build_small_internvl(vision, text)
    embedding = base.get_input_embeddings()
    old = len(embedding.weight)
    model = expand_vocab_for_lfq(base, {"output_dim": 6})
    start, end = get_lfq_token_range(model, {"output_dim": 6})
    codes = torch.randint(0, 2, (4, 100, 6))
    ids = encode_lfq_codes_to_tokens(codes, start, 6)

    def decoded(start_token_id: int, output_dim: int) -> dict:
        """Share of codes that come back, and the result or error of the documented call."""
        call = lambda: decode_tokens_to_lfq_codes(ids, start_token_id, output_dim)  # noqa: E731
        answer = result_or_error(call)
        back = call() if not answer.startswith("ValueError") else None
        same = back is not None and back.shape == codes.shape
        share = (back == codes).all(-1).float().mean().item() if same else 0.0
        return {"share": share, "answer": f"{tuple(back.shape)}" if back is not None else answer}

    def size() -> dict:
        table_shape = tuple(model.language_model.get_input_embeddings().weight.shape)
        sizes = model.language_model.config.vocab_size
        return {"answer": f"vocab_size {sizes} = {old} + 2^6, ids {start} - {end - 1}, table {table_shape}"}

    wrong_states = torch.zeros(1, 3, 48)
    rows = {
        "vocabulary: as expanded": size,
        "vocabulary: output_dim 8 instead of 6": lambda: {
            "answer": result_or_error(lambda: get_lfq_token_range(model, {"output_dim": 8}))
        },
        "embeddings: padding_idx": lambda: {
            "answer": f"{embedding.padding_idx} before, {getattr(model.get_input_embeddings(), 'padding_idx', None)} after"
        },
        "embeddings: width 48 instead of 32": lambda: {
            "answer": result_or_error(lambda: model(inputs_embeds=wrong_states))
        },
        "codes: start_token_id and output_dim as told": lambda: decoded(start, 6),
        "codes: start_token_id one too large": lambda: decoded(start + 1, 6),
        "codes: start_token_id one too small": lambda: decoded(start - 1, 6),
        "codes: output_dim 5": lambda: decoded(start, 5),
        "codes: output_dim 7": lambda: decoded(start, 7),
    }
    return table({name: runs.row("lfq", name, measure) for name, measure in rows.items()}, LFQ_COLUMNS, "LFQ")


SECTIONS = {"vqgan": vqgan, "pruning": pruning, "memory": memory, "lfq": lfq}


def main(argv: list[str] | None = None) -> dict:
    """Runs the sections, prints their tables and returns the results."""
    values = parse_recipe(__doc__, {"run": SmallRunArguments}, None, argv)["run"]
    runs = SmallRuns(
        SmallRunArguments(**{"output": "outputs/benchmarks/small_runs/troubleshooting.json"} | values), list(SECTIONS)
    )
    torch.set_num_threads(1)
    for name in runs.sections:
        print(f"\n{SECTIONS[name](runs)}\n", flush=True)
    return runs.results


if __name__ == "__main__":
    run_recipe(main)
