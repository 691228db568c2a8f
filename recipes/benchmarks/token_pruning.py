"""Compares ways of vision token pruning at equal FLOPs: hard mode, the same questions, paired bootstrap.

    python recipes/benchmarks/token_pruning.py                                   # outputs/small_vlm, 5 seeds
    python recipes/benchmarks/token_pruning.py --seeds 1 --max_steps 50 --ablations false

Rows: the unpruned model; the question alone (another question's picture); our two stages with LoRA; every training-free
strategy; random tokens, DivPrune-like tokens and the unpruned model with the same LoRA fine-tune, data and steps; a
smaller image, as it is and with the same fine-tune. Each baseline keeps as many tokens as bring it to **at least** our
FLOPs (heads, vision tower and projector included), so that rounding favours the baseline. `--ablations true` adds rows
with something left out or changed (first seed only). Rows are saved as they are measured, so an interrupted comparison
continues where it stopped.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from downsampled_vlm import can_downsample, downsampled_vlm, shrunk
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from tokcom_hf import PrunedVLM
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.vqa import VQADataset
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, vqa_collator
from tokcom_hf.evaluation.pruning_answers import evaluate_mode
from tokcom_hf.metrics.vqa import paired_bootstrap
from tokcom_hf.models.pruning_strategies import LAYER_STRATEGIES, STRATEGIES
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.pruning_build import PRUNING_SECTIONS, build_heads, train_heads

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "train_token_pruning.yaml"
OURS, QUESTION_ONLY = "merger + pruners + LoRA", "question only (other picture)"
# Strategies that also get our LoRA fine-tune: chance, and the best of those that need no training.
TUNED = ("random", "divprune")
# Row -> what it changes in our two stages.
ABLATIONS: dict[str, dict] = {
    "no merger": {"merger": False},
    "no pruners": {"pruners": False},
    "no KL": {"kl_weight": 0.0},
    "no attention guidance": {"guidance_weight": 0.0},
    "with adversarial part": {"adversarial_weight": 0.1},
    "documented losses only": {
        "kl_weight": 0.0,
        "guidance_weight": 0.0,
        "adversarial_weight": 1.0,
        "task_weight": 25.0,
        "merge_entropy_weight": 0.0,
        "merge_sparsity_weight": 1e-4,
        "keep_rate_weight": 0.0,
        "binarization_weight": 0.0,
    },
    "frozen base (no LoRA)": {"lora_r": 0},
}


@dataclass
class RunArguments:
    """Extent of the comparison."""

    base_model: str = field(default="outputs/small_vlm", metadata={"help": "VLM by Hub name or folder."})
    output_dir: str = field(default="outputs/benchmark_token_pruning", metadata={"help": "Folder of results.json."})
    seeds: int = field(default=5, metadata={"help": "Training seeds."})
    overwrite: bool = field(default=False, metadata={"help": "Measure again what the output folder holds."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; all by default."})
    ablations: bool = field(default=True, metadata={"help": "Also train the ablations (first seed only)."})


SECTIONS = {"run": RunArguments, "data": VQASourceArguments, **PRUNING_SECTIONS}


class Comparison:
    """The shared data and budget of all rows of the table."""

    def __init__(self, run: RunArguments, values: dict):
        self.run, self.values = run, values
        self.source = VQASourceArguments(**values["data"])
        self.processor = AutoProcessor.from_pretrained(run.base_model)
        train, self.rows = load_vqa_rows(self.source, run.base_model)
        assert train is not None
        self.train_rows = train
        self.collator = vqa_collator(self.source, self.processor, answers=False)
        self.full_sequence = 0.0  # tokens of the unpruned prompt; set by main once measured

    def base(self):
        """A new copy of the base model."""
        return AutoModelForImageTextToText.from_pretrained(self.run.base_model).eval()

    def learned(self, seed: int, merger: bool = True, pruners: bool = True, **changes) -> dict:
        """Our two stages, or one of them, trained with some arguments changed."""
        return self.evaluate(self.train(self.heads(merger, pruners), seed, **changes))

    def heads(self, merger: bool, pruners: bool) -> PrunedVLM:
        """The base model with new, untrained heads."""
        first, second = self.values["merger"], self.values["pruner"]
        return build_heads(self.base(), first if merger else None, second if pruners else None)

    def base_written(self) -> int:
        """Sum of the weight files' times of writing (0 for a Hub name): changes when the base is trained again."""
        return sum(path.stat().st_mtime_ns for path in Path(self.run.base_model).glob("*.safetensors"))

    def train(self, model: PrunedVLM, seed: int, rows=None, processor=None, **changes) -> PrunedVLM:
        """The model after training on `rows` (our training rows by default), with `changes` of training arguments."""
        place = {"output_dir": str(Path(self.run.output_dir) / "work"), "seed": seed}
        arguments = self.values["training"] | changes | place
        collator = vqa_collator(self.source, processor or self.processor)
        data = self.train_rows if rows is None else rows
        return train_heads(model, arguments, data, collator, self.values["discriminator"])

    def evaluate(self, model: PrunedVLM, rows=None, mode: str = "hard", processor=None) -> dict:
        """Metrics of the model on `rows`, the held-out rows by default."""
        length = self.values["training"].get("eval_max_new_tokens", 4)
        collator = vqa_collator(self.source, processor, answers=False) if processor else self.collator
        return evaluate_mode(model, collator, self.rows if rows is None else rows, mode, length)

    def question_only(self) -> dict:
        """The unpruned model with the picture of the next question of the same type."""
        rows = self._held_out()
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row["types"][0], []).append(place)
        following = {a: b for same in places.values() for a, b in zip(same, same[1:] + same[:1])}
        swapped = [row | {"image": rows[following[place]]["image"]} for place, row in enumerate(rows)]
        return self.evaluate(PrunedVLM.from_base(self.base()), VQADataset(swapped), "origin")

    def free(self, strategy: str, keep: int, seed: int, train: bool = False) -> dict:
        """A training-free strategy, or the same with our LoRA fine-tune."""
        model = PrunedVLM.from_base(self.base(), strategy=strategy, keep=keep, strategy_seed=seed)
        return self.evaluate(self.train(model, seed) if train else model.eval())

    def tuned_unpruned(self, seed: int) -> dict:
        """The unpruned model with our LoRA fine-tune."""
        # No KL loss, because the unpruned teacher would be this same model.
        return self.evaluate(self.train(PrunedVLM.from_base(self.base()), seed, kl_weight=0.0), mode="origin")

    def downsampled(self, size: int, full_flops: float, seed: int, train: bool = False, rows=None) -> dict:
        """Smaller pictures, or the same with our LoRA fine-tune; FLOPs relative to the full picture's."""
        base, processor = downsampled_vlm(self.base(), self.processor, size)
        model = PrunedVLM.from_base(base)
        if train:
            # No KL loss, because its unpruned teacher would be this same model on small pictures.
            self.train(model, seed, shrunk(self.train_rows, size), processor, kl_weight=0.0)
        result = self.evaluate(model, shrunk(self.rows if rows is None else rows, size), "origin", processor)
        ratio = result["flops"] / full_flops
        full = self.full_sequence or result["vision_tokens"] + result["text_tokens"]
        kept = (result["vision_tokens"] + result["text_tokens"]) / full
        return result | {"flops_ratio": ratio, "sequence_kept": kept}

    def smallest_image(self, ratio: float, full_flops: float) -> int:
        """Smallest side, in pixels, at which the picture costs at least `ratio` of the unpruned FLOPs."""
        vision = self.base().config.vision_config
        few = VQADataset(self._held_out()[:20])
        for size in range(vision.patch_size, vision.image_size, vision.patch_size):
            if self.downsampled(size, full_flops, 0, rows=few)["flops_ratio"] >= ratio:
                return size
        return vision.image_size

    def _held_out(self) -> list[dict]:
        return [self.rows[i] for i in range(len(self.rows))]

    def cheapest_keep(self, strategy: str, ratio: float, tokens: int) -> int:
        """Fewest tokens with which the strategy costs at least `ratio` of the unpruned FLOPs."""
        few = VQADataset(self._held_out()[:20])
        for keep in range(1, tokens + 1):
            model = PrunedVLM.from_base(self.base(), strategy=strategy, keep=keep).eval()
            if self.evaluate(model, few)["flops_ratio"] >= ratio:
                return keep
        return tokens


class Rows:
    """Finished rows of the table, saved one by one, so that an interrupted comparison continues where it stopped."""

    def __init__(self, folder: Path, fingerprint: dict, overwrite: bool):
        self.path = folder / "rows.json"
        self.fingerprint = json.loads(json.dumps(fingerprint, default=str))
        self.table: dict[str, dict[str, dict]] = {}
        if self.path.is_file() and not overwrite:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["fingerprint"] != self.fingerprint:
                raise RecipeError(
                    f"{self.path} holds rows of another comparison (other settings or base model). Choose another "
                    "--output_dir, or --overwrite them."
                )
            self.table = saved["table"]
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, seed: int, measure: Callable[..., dict], *args, **kwargs) -> dict:
        """The row's result for a seed, measured and saved if it is missing."""
        row = self.table.setdefault(name, {})
        if str(seed) not in row:
            set_seed(seed)
            started = time.time()
            result = {k: v for k, v in measure(*args, **kwargs).items() if k != "answers"}
            row[str(seed)] = result | {"seconds": round(time.time() - started, 1)}
            text = json.dumps({"fingerprint": self.fingerprint, "table": self.table})
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(self.path)
            print(
                f"{name} (seed {seed}): {100 * result['accuracy']['all']:.1f} %, {row[str(seed)]['seconds']:.0f} s",
                flush=True,
            )
        return row[str(seed)]

    def of(self, name: str, seeds: range) -> list[dict]:
        """The row's results for these seeds; an earlier run in the folder may have had more."""
        return [result for seed, result in self.table[name].items() if int(seed) in seeds]


def main() -> None:
    """Measures all rows of the comparison; prints and saves the table."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    if not (Path(run.base_model) / "config.json").is_file() and run.base_model == RunArguments.base_model:
        raise RecipeError(
            f"{run.base_model} does not exist; run recipes/pretrain_vlm.py first, or name a --base_model."
        )
    use_all_cores(run.threads)
    comparison = Comparison(run, values)
    settings = {k: v for k, v in values.items() if k != "run"} | {"base_model": run.base_model}
    rows = Rows(Path(run.output_dir), settings | {"base_written": comparison.base_written()}, run.overwrite)
    seeds = range(run.seeds)

    unpruned = rows.add("unpruned", 0, comparison.evaluate, PrunedVLM.from_base(comparison.base()), mode="origin")
    comparison.full_sequence = unpruned["vision_tokens"] + unpruned["text_tokens"]
    rows.add(QUESTION_ONLY, 0, comparison.question_only)
    for seed in seeds:
        rows.add(OURS, seed, comparison.learned, seed)
    ratio = statistics.mean(row["flops_ratio"] for row in rows.of(OURS, seeds))
    tokens = int(unpruned["vision_tokens"])
    for strategy in (*STRATEGIES, *LAYER_STRATEGIES):
        keep = comparison.cheapest_keep(strategy, ratio, tokens)
        for seed in seeds if strategy == "random" else (0,):
            rows.add(f"{strategy} ({keep})", seed, comparison.free, strategy, keep, seed)
    for strategy in TUNED:
        keep = comparison.cheapest_keep(strategy, ratio, tokens)
        for seed in seeds:
            rows.add(f"{strategy} + LoRA", seed, comparison.free, strategy, keep, seed, train=True)
    for seed in seeds:
        rows.add("unpruned + LoRA", seed, comparison.tuned_unpruned, seed)
    if can_downsample(comparison.base()):
        size = comparison.smallest_image(ratio, unpruned["flops"])
        rows.add(f"image of {size} pixels", 0, comparison.downsampled, size, unpruned["flops"], 0)
        for seed in seeds:
            name = f"image of {size} pixels + LoRA"
            rows.add(name, seed, comparison.downsampled, size, unpruned["flops"], seed, train=True)
    if run.ablations:
        for name, changes in ABLATIONS.items():
            rows.add(name, 0, comparison.learned, 0, **changes)
    report(comparison, {name: rows.of(name, seeds) for name in rows.table}, Path(run.output_dir))


def report(comparison: Comparison, table: dict[str, list[dict]], out: Path) -> None:
    """Prints and saves the table; a difference is ours minus the row, on the same questions, over all seeds."""
    lines = {}
    ours = [r["scores"] for r in table[OURS]]
    print(f"\n{len(comparison.rows)} questions, {len(ours)} seed(s)")
    print(f"{'':28s}{'accuracy':>9s}{'± sd':>7s}{'FLOPs':>8s}{'seq.':>7s}   ours minus this row [95 %]")
    for name, runs in table.items():
        accuracy = [r["accuracy"]["all"] for r in runs]
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
        sd = "" if line["sd"] is None else f"{100 * line['sd']:.1f}"
        print(
            f"{name:28s}{100 * line['accuracy']:8.1f}%{sd:>7s}{100 * line['flops_ratio']:7.1f}%"
            f"{100 * line['sequence_kept']:6.1f}%   {text}"
        )
        lines[name] = line
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    run_recipe(main)
