"""Fair comparison of vision token pruning: equal FLOPs, hard mode, same questions, paired bootstrap.

    python recipes/benchmarks/token_pruning.py                                   # outputs/small_vlm, 5 seeds
    python recipes/benchmarks/token_pruning.py --seeds 1 --max_steps 50 --ablations false

Rows: the unpruned model; the question alone (a grey image); our two stages with LoRA; random tokens with the same LoRA
fine-tune, data and steps; every training-free strategy. Each baseline keeps as many tokens as bring it to **at least**
our FLOPs (heads, vision tower and projector included), so that rounding favours the baseline. With `--ablations true`
also: without merger, without pruners, without KL, with the adversarial part, and the documented losses only.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from tokcom_hf import (
    LayerPrunerConfig,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMergerConfig,
    TokenPruningTrainer,
    TokenPruningTrainingArguments,
)
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.vqa import VQACollator, VQADataset
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows
from tokcom_hf.metrics.vqa import paired_bootstrap
from tokcom_hf.models.token_selection import LAYER_STRATEGIES, STRATEGIES
from tokcom_hf.trainers.pruning_evaluation import evaluate_mode

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "train_token_pruning.yaml"
OURS, RANDOM_TUNED = "merger + pruners + LoRA", "random + LoRA"


@dataclass
class RunArguments:
    """Extent of the comparison."""

    base_model: str = field(default="outputs/small_vlm", metadata={"help": "VLM by Hub name or folder."})
    output_dir: str = field(default="outputs/benchmark_token_pruning", metadata={"help": "Folder of results.json."})
    seeds: int = field(default=5, metadata={"help": "Training seeds."})
    ablations: bool = field(default=True, metadata={"help": "Also train the ablations (first seed only)."})


SECTIONS = {
    "run": RunArguments,
    "data": VQASourceArguments,
    "merger": TokenMergerConfig,
    "pruner": LayerPrunerConfig,
    "discriminator": PruningDiscriminatorConfig,
    "training": TokenPruningTrainingArguments,
}


class Comparison:
    """The shared data and budget of all rows of the table."""

    def __init__(self, run: RunArguments, values: dict):
        self.run, self.values = run, values
        self.source = VQASourceArguments(**values["data"])
        self.processor = AutoProcessor.from_pretrained(run.base_model)
        train, self.rows = load_vqa_rows(self.source, run.base_model)
        assert train is not None
        self.train_rows = train
        self.collator = VQACollator(self.processor, self.source.prompt, answers=False)

    def base(self):
        return AutoModelForImageTextToText.from_pretrained(self.run.base_model).eval()

    def heads(self, merger: bool = True, pruners: bool = True, **changes) -> PrunedVLM:
        base = self.base()
        probe = PrunedVLM.from_base(base)
        width, features = probe.adapter.text_config.hidden_size, probe.adapter.feature_size
        first = TokenMergerConfig(**self.values["merger"] | {"feature_size": features, "question_size": width})
        second = LayerPrunerConfig(**self.values["pruner"] | changes | {"hidden_size": width})
        return PrunedVLM.from_base(base, first if merger else None, second if pruners else None)

    def train(self, model: PrunedVLM, seed: int, **changes) -> PrunedVLM:
        arguments = self.values["training"] | changes | {
            "output_dir": str(Path(self.run.output_dir) / "work"),
            "seed": seed,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        }  # fmt: skip
        args = TokenPruningTrainingArguments(**arguments)
        discriminator = None
        if args.adversarial_weight > 0:
            width = model.adapter.text_config.hidden_size
            config = PruningDiscriminatorConfig(**self.values["discriminator"] | {"hidden_size": width})
            discriminator = PruningDiscriminator(config)
        trainer = TokenPruningTrainer(
            model=model,
            args=args,
            train_dataset=self.train_rows,
            data_collator=VQACollator(self.processor, self.source.prompt),
            discriminator=discriminator,
        )
        trainer.train()
        if args.lora_r:
            trainer.merge_lora()
        return model.eval()

    def evaluate(self, model: PrunedVLM, rows=None, mode: str = "hard") -> dict:
        length = self.values["training"].get("eval_max_new_tokens", 4)
        return evaluate_mode(model, self.collator, self.rows if rows is None else rows, mode, length)

    def cheapest_keep(self, strategy: str, ratio: float, tokens: int) -> int:
        """Fewest tokens with which the strategy costs at least `ratio` of the unpruned FLOPs."""
        few = VQADataset([self.rows[i] for i in range(min(20, len(self.rows)))])
        for keep in range(1, tokens + 1):
            model = PrunedVLM.from_base(self.base(), strategy=strategy, keep=keep).eval()
            if self.evaluate(model, few)["flops_ratio"] >= ratio:
                return keep
        return tokens


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    if not (Path(run.base_model) / "config.json").is_file() and run.base_model == RunArguments.base_model:
        raise RecipeError(
            f"{run.base_model} does not exist; run recipes/pretrain_vlm.py first, or name a --base_model."
        )
    comparison = Comparison(run, values)
    table: dict[str, list[dict]] = {}
    unpruned = PrunedVLM.from_base(comparison.base())
    table["unpruned"] = [comparison.evaluate(unpruned, mode="origin")]
    grey = VQADataset(
        [row | {"image": Image.new("RGB", row["image"].size, (128, 128, 128))} for row in all_rows(comparison)]
    )
    table["question only (grey image)"] = [comparison.evaluate(unpruned, grey, "origin")]
    for seed in range(run.seeds):
        set_seed(seed)
        table.setdefault(OURS, []).append(comparison.evaluate(comparison.train(comparison.heads(), seed)))
    ratio = statistics.mean(r["flops_ratio"] for r in table[OURS])
    tokens = int(table["unpruned"][0]["vision_tokens"])
    keep = comparison.cheapest_keep("random", ratio, tokens)
    for seed in range(run.seeds):
        set_seed(seed)
        model = PrunedVLM.from_base(comparison.base(), strategy="random", keep=keep, strategy_seed=seed)
        table.setdefault(RANDOM_TUNED, []).append(comparison.evaluate(comparison.train(model, seed)))
    for strategy in (*STRATEGIES, *LAYER_STRATEGIES):
        keep = comparison.cheapest_keep(strategy, ratio, tokens)
        model = PrunedVLM.from_base(comparison.base(), strategy=strategy, keep=keep).eval()
        table[f"{strategy} ({keep})"] = [comparison.evaluate(model)]
    if run.ablations:
        table |= ablations(comparison)
    report(comparison, table, Path(run.output_dir))


def all_rows(comparison: Comparison) -> list[dict]:
    return [comparison.rows[i] for i in range(len(comparison.rows))]


def ablations(comparison: Comparison) -> dict[str, list[dict]]:
    """First seed; each changes one thing."""
    variants = {
        "no merger": (lambda: comparison.heads(merger=False), {}),
        "no pruners": (lambda: comparison.heads(pruners=False), {}),
        "no KL": (comparison.heads, {"kl_weight": 0.0}),
        "with adversarial part": (comparison.heads, {"adversarial_weight": 0.1}),
        "documented losses only": (
            comparison.heads,
            {
                "kl_weight": 0.0,
                "adversarial_weight": 1.0,
                "task_weight": 25.0,
                "merge_sparsity_weight": 1e-4,
                "keep_rate_weight": 0.0,
                "binarization_weight": 0.0,
            },
        ),
        "frozen base (no LoRA)": (comparison.heads, {"lora_r": 0}),
    }
    results = {}
    for name, (build, changes) in variants.items():
        set_seed(0)
        results[name] = [comparison.evaluate(comparison.train(build(), 0, **changes))]
    return results


def report(comparison: Comparison, table: dict[str, list[dict]], out: Path) -> None:
    """Prints and saves the table; differences are ours minus the row, on the same questions, all seeds together."""
    lines = {}
    ours = [r["scores"] for r in table[OURS]]
    print(f"\n{len(comparison.rows)} questions, {len(ours)} seed(s)")
    print(f"{'':28s}{'accuracy':>9s}{'± sd':>7s}{'FLOPs':>8s}{'seq.':>7s}   ours minus this row [95 %]")
    for name, runs in table.items():
        accuracy = [100 * r["accuracy"]["all"] for r in runs]
        line = {
            "accuracy": statistics.mean(accuracy),
            "sd": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
            "by_type": {k: statistics.mean(r["accuracy"][k] for r in runs) for k in runs[0]["accuracy"]},
            "flops_ratio": statistics.mean(r["flops_ratio"] for r in runs),
            "sequence_kept": statistics.mean(r["sequence_kept"] for r in runs),
        }
        text = ""
        if name != OURS:
            first = [score for scores in ours for score in scores]
            second = [score for i in range(len(ours)) for score in runs[i % len(runs)]["scores"]]
            line["paired"] = paired_bootstrap(first, second, 2000)
            text = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**line["paired"])
        sd = "" if line["sd"] is None else f"{line['sd']:.1f}"
        print(
            f"{name:28s}{line['accuracy']:8.1f}%{sd:>7s}{100 * line['flops_ratio']:7.1f}%"
            f"{100 * line['sequence_kept']:6.1f}%   {text}"
        )
        lines[name] = line
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    run_recipe(main)
