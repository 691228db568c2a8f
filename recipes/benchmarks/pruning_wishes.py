"""The documents' optional improvements of token pruning, one at a time, at equal FLOPs on procedural scenes.

    python recipes/pretrain_vlm.py --captions true                              # once: a small VLM that can caption, too
    python recipes/benchmarks/pruning_wishes.py                                 # outputs/small_vlm; 5 minutes of one core
    python recipes/benchmarks/pruning_wishes.py --steps 20 --eval_questions 100 # a look

Each row trains a merger and pruners with LoRA, for the same number of steps and scenes: one ratio at every layer; a list of
ratios that fall from layer to layer; merger scores guided by the question's attention; a number of merged tokens that
depends on the question; questions and captions in every batch. Two more rows leave the guidance loss out. All rows are
measured on the same questions and captions with tokens really removed; FLOPs include vision tower, projector and heads.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from tokcom_hf import PrunedVLM
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, vqa_collator
from tokcom_hf.evaluation.pruning_answers import evaluate_mode
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.pruning_build import PRUNING_SECTIONS, build_heads, train_heads

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "train_token_pruning.yaml"
# 64 vision tokens of the small VLM become 12, then 6 and 3.
FIXED = {"target_merge_tokens": 12}
RATIOS = {"keep_tokens": None, "keep_ratio": 0.5}
DYNAMIC = {"target_merge_tokens": 12, "merge_ratio": 0.1875, "min_ratio": 0.0625, "max_ratio": 0.5}
# The budget is enforced by the sparsity loss, which is measured in squared tokens.
BUDGET = {"merge_sparsity_weight": 0.01}
# name: (merger, pruner, training, data)
WISHES: dict[str, tuple[dict, dict, dict, dict]] = {
    "fixed ratio": (FIXED, RATIOS, {}, {}),
    # These lists leave 7 and 2 tokens, or 8 and 1; the fixed ratio leaves 6 and 3.
    "hierarchical list": (FIXED, {"keep_tokens": None, "keep_ratio": [0.58, 0.29]}, {}, {}),
    "hierarchical list, steep": (FIXED, {"keep_tokens": None, "keep_ratio": [0.67, 0.125]}, {}, {}),
    "attention-guided": (FIXED | {"attention_guided": "question"}, RATIOS, {}, {}),
    "question-dependent (learned)": (DYNAMIC | {"question_dependent_ratio": "learned"}, RATIOS, BUDGET, {}),
    "question-dependent (confidence)": (DYNAMIC | {"question_dependent_ratio": "confidence"}, RATIOS, BUDGET, {}),
    "questions and captions": (FIXED, RATIOS, {}, {"task": "both"}),
    "fixed ratio, no guidance loss": (FIXED, RATIOS, {"guidance_weight": 0.0}, {}),
    "attention-guided, no guidance loss": (
        FIXED | {"attention_guided": "question"}, RATIOS, {"guidance_weight": 0.0}, {},
    ),
}  # fmt: skip


@dataclass
class RunArguments:
    """Extent of the comparison."""

    base_model: str = field(default="outputs/small_vlm", metadata={"help": "VLM by Hub name or folder."})
    output_dir: str = field(default="outputs/benchmark_pruning_wishes", metadata={"help": "Folder of results.json."})
    steps: int = field(default=120, metadata={"help": "Training steps of each row."})
    seed: int = field(default=42, metadata={"help": "Seed of heads and training."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; all by default."})
    rows: list[str] | str | None = field(default=None, metadata={"help": "Only these rows; all where not set."})

    def __post_init__(self):
        # A single name on the command line arrives as a string.
        self.rows = [self.rows] if isinstance(self.rows, str) else self.rows


# The default configuration also has a discriminator section, which is read but not used: no row is adversarial.
SECTIONS = {"run": RunArguments, "data": VQASourceArguments, **PRUNING_SECTIONS}


def main() -> None:
    """Trains and measures all rows; prints and saves them."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    unknown = [name for name in run.rows or () if name not in WISHES]
    if unknown:
        raise RecipeError(f"Unknown rows {unknown}; there are {', '.join(WISHES)}.")
    use_all_cores(run.threads)
    processor = AutoProcessor.from_pretrained(run.base_model)
    _, held_out = load_vqa_rows(
        VQASourceArguments(**values["data"] | {"task": "both"}), run.base_model, training=False
    )
    base = AutoModelForImageTextToText.from_pretrained(run.base_model).eval()
    lines = {"unpruned": measure(PrunedVLM.from_base(base), processor, values, held_out, "origin")}
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in run.rows or WISHES:
        merger, pruner, training, data = WISHES[name]
        changed = values | {
            "merger": values["merger"] | merger, "pruner": values["pruner"] | pruner,
            "training": values["training"] | training, "data": values["data"] | data,
        }  # fmt: skip
        started = time.process_time()
        model = train(run, changed, processor, out)
        lines[name] = measure(model, processor, changed, held_out, "hard")
        lines[name]["seconds"] = round(time.process_time() - started, 1)
        (out / "results.json").write_text(json.dumps(report(run, held_out, lines), indent=2) + "\n", encoding="utf-8")
        print(line(name, lines[name]), flush=True)
    print(f"\n{'':36s}{'accuracy':>9s}{'BLEU':>7s}{'FLOPs':>8s}  vision tokens per layer")
    for name, row in lines.items():
        print(line(name, row))


def train(run: RunArguments, values: dict, processor, out: Path) -> PrunedVLM:
    """A merger and pruners, trained with LoRA and merged into the base."""
    set_seed(run.seed)
    base = AutoModelForImageTextToText.from_pretrained(run.base_model)
    model = build_heads(base, values["merger"], values["pruner"])
    source = VQASourceArguments(**values["data"])
    rows, _ = load_vqa_rows(source, run.base_model)
    fixed = {"output_dir": str(out / "work"), "seed": run.seed, "max_steps": run.steps, "adversarial_weight": 0.0}
    return train_heads(model, values["training"] | fixed, rows, vqa_collator(source, processor))


def measure(model: PrunedVLM, processor, values: dict, rows, mode: str) -> dict:
    """Accuracy on the questions, smoothed BLEU on the captions, tokens and FLOPs."""
    collator = vqa_collator(VQASourceArguments(**values["data"]), processor, answers=False)
    result = evaluate_mode(model.eval(), collator, rows, mode)
    names = ("accuracy", "bleu", "flops_ratio", "sequence_kept", "vision_tokens_per_layer", "merged_tokens_by_type")
    spread = result["merged_tokens"]
    return {name: result[name] for name in names} | {"merged_tokens_range": [min(spread), max(spread)]}


def report(run: RunArguments, rows, lines: dict) -> dict:
    """The contents of results.json: the setting and the rows."""
    questions = sum(row.get("task") != "caption" for row in rows.rows)
    setting = {"steps": run.steps, "seed": run.seed, "questions": questions, "captions": len(rows) - questions}
    return {"setting": setting, "rows": lines}


def line(name: str, row: dict) -> str:
    """A row as a line of the printed table."""
    tokens = " ".join(f"{n:.1f}" for n in row["vision_tokens_per_layer"])
    spread = "–".join(map(str, row["merged_tokens_range"]))
    return (
        f"{name:36s}{100 * row['accuracy']['all']:8.1f}%{row['bleu']:7.1f}{100 * row['flops_ratio']:7.1f}%  {tokens}"
        f" (merged: {spread})"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    run_recipe(main)
