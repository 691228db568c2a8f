"""Evaluates a pruned VLM in every mode, or a training-free strategy on any VLM.

    python recipes/eval_token_pruning.py                                         # outputs/token_pruning
    python recipes/eval_token_pruning.py --task both                             # questions: accuracy; captions: BLEU
    python recipes/eval_token_pruning.py --model outputs/small_vlm --strategy divprune --keep 16
    python recipes/eval_token_pruning.py --model outputs/small_vlm --strategy fastv --strategy_layer 1 --keep 16
    python recipes/eval_token_pruning.py --model llava-hf/llava-1.5-7b-hf --strategy visionzip --keep 192 \
        --eval_file val.jsonl --prompt "USER: <image>\n{question} ASSISTANT:"

Prints and saves accuracy per question type, BLEU, tokens per layer, FLOPs (those of merger and pruners included), prefill
and decode time beside the unpruned model's, KV memory, and pictures of the patches that each layer keeps.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tokcom_hf import PrunedVLM
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, vqa_collator
from tokcom_hf.evaluation.pruning_answers import evaluate_mode, named_metrics
from tokcom_hf.evaluation.pruning_prefill import time_modes
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.models.pruning_strategies import LAYER_STRATEGIES
from tokcom_hf.plots.pruning import plot_kept_patches


@dataclass
class RunArguments:
    """What is evaluated."""

    model: str = field(default="outputs/token_pruning", metadata={"help": "Pruned VLM, or any VLM with --strategy."})
    processor: str | None = field(
        default=None, metadata={"help": "Processor by Hub id or folder; if not set, the model's."}
    )
    output_dir: str = field(default="outputs/eval_token_pruning", metadata={"help": "Folder of the reports."})
    strategy: str | None = field(default=None, metadata={"help": "Training-free strategy on an unpruned VLM."})
    keep: int | None = field(default=None, metadata={"help": "Vision tokens per image that the strategy keeps."})
    strategy_layer: int | None = field(
        default=None, metadata={"help": "Layer of the language model before which fastv removes tokens; 2 by default."}
    )
    max_new_tokens: int = field(default=4, metadata={"help": "Most tokens of an answer."})
    caption_max_new_tokens: int = field(
        default=64, metadata={"help": "Most tokens of a caption (--task caption or both)."}
    )
    batch_size: int = field(default=50, metadata={"help": "Questions per batch."})
    pictures: int = field(default=4, metadata={"help": "Images drawn with the patches that each layer keeps."})
    repeats: int = field(default=5, metadata={"help": "Repetitions of the time measurement."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32 or bfloat16."})


def main() -> None:
    """Measures all modes; prints and saves metrics, times and pictures."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": VQASourceArguments})
    run, source = RunArguments(**values["run"]), VQASourceArguments(**values["data"])
    if run.model == RunArguments.model and not (Path(run.model) / "config.json").is_file():
        raise RecipeError(f"{run.model} does not exist; run recipes/train_token_pruning.py first, or name a --model.")
    model = load_model(run)
    processor = load_pretrained(AutoProcessor, run.processor or run.model, "Processor")
    base_model = model.config.base_model_name_or_path or run.model
    base_model = run.model if base_model == "base" else base_model
    _, rows = load_vqa_rows(source, base_model, training=False)
    collator = vqa_collator(source, processor, answers=False, kept=model.config.tokens_kept)

    learned = model.token_merger is not None or model.layer_pruner is not None
    modes = ["origin", "merge_only", "soft", "hard"] if learned else ["origin", "hard"]
    lengths = {"max_new_tokens": run.max_new_tokens, "caption_max_new_tokens": run.caption_max_new_tokens}
    table = {m: evaluate_mode(model, collator, rows, m, batch_size=run.batch_size, **lengths) for m in modes}
    batch = collator([rows[i] for i in range(min(run.batch_size, len(rows)))])
    times = time_modes(model, batch, ["origin", "hard"], run.repeats)
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    per_row = ("scores", "answers", "merged_tokens")
    summary = {mode: {k: v for k, v in result.items() if k not in per_row} for mode, result in table.items()}
    results = named_metrics(table) | {"modes": summary, "times": times}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = [rows[i] for i in range(min(run.pictures, len(rows)))]
    model.pruning_mode = "hard"
    figure_note = plot_kept_patches(model, collator, shown, out / "kept_patches.png")
    print_table(table, times)
    for name, value in named_metrics(table).items():
        print(f"{name}: {value:.4g}")
    print(figure_note)


def load_model(run: RunArguments) -> PrunedVLM:
    """A saved PrunedVLM, or a VLM wrapped with a strategy."""
    kind = load_pretrained(AutoConfig, run.model).model_type
    if kind == "tokcom_pruned_vlm":
        if run.strategy:
            raise RecipeError(f"{run.model} is pruned already; --strategy needs an unpruned VLM.")
        return load_pretrained(AutoModelForImageTextToText, run.model, dtype=run.dtype)
    if not run.strategy or not run.keep:
        raise RecipeError(f"{run.model} is an unpruned {kind}; name a --strategy and --keep.")
    layer = {} if run.strategy_layer is None else {"strategy_layer": run.strategy_layer}
    if layer and run.strategy not in LAYER_STRATEGIES:
        raise RecipeError(f"--strategy_layer is for --strategy fastv; {run.strategy} works before the language model.")
    base = load_pretrained(AutoModelForImageTextToText, run.model, dtype=run.dtype)
    return PrunedVLM.from_base(base.eval(), strategy=run.strategy, keep=run.keep, **layer).eval()


def print_table(table: dict, times: dict) -> None:
    """Prints metrics and times, one line per mode."""
    kinds = list(table["origin"]["accuracy"])
    print(
        f"{'mode':12s}"
        + "".join(f"{kind:>10s}" for kind in kinds)
        + f"{'BLEU':>7s}{'FLOPs':>8s}{'seq.':>7s}{'KV':>7s}  tokens"
    )
    for mode, r in table.items():
        accuracies = "".join(f"{100 * r['accuracy'][kind]:9.1f}%" for kind in kinds)
        kv = r["kv_bytes"] / r["kv_bytes_origin"]
        tokens = " ".join(f"{n:.0f}" for n in r["vision_tokens_per_layer"])
        cost = f"{100 * r['flops_ratio']:7.1f}%{100 * r['sequence_kept']:6.1f}%{100 * kv:6.1f}%"
        print(f"{mode:12s}{accuracies}{r['bleu']:7.1f}{cost}  {tokens}")
    for mode, seconds in times.items():
        print(
            f"{mode:12s} prefill {1000 * seconds['prefill']:.1f} ms, one decoded token {1000 * seconds['decode']:.2f} ms"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    run_recipe(main)
