"""Measures what each remedy of TokCom contributes: every row changes one setting of the starting row.

    python recipes/benchmarks/tokcom_ablations.py                               # embedded text, a few hours on two cores
    python recipes/benchmarks/tokcom_ablations.py --train_file train.txt --validation_file development.txt \
        --only one_noise_draw no_heads
    python recipes/benchmarks/tokcom_ablations.py --train_config recipes/configs/base/train_tokcom.yaml    # on a GPU

The rows come from the configuration: `train` overrides options of recipes/train_tokcom.py, `config` names another training
configuration, `generate` holds settings of `generate`. A row without `train` uses the model of the starting row, or of the
row that `model` names; a row that does not change the VAE uses the VAE of the starting row. Prints a table and writes
`ablations.json`. Rows already measured in the output folder are kept, so an interrupted run continues. Measure on
development text, because these rows serve to choose settings.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.text_generation import TokComSampler
from tokcom_hf.evaluation.text_likelihood import head_losses
from tokcom_hf.evaluation.text_protocol import SamplingPlan, held_out_prefixes, measure_sampler
from tokcom_hf.evaluation.tokcom_denoising import denoising_metrics
from tokcom_hf.evaluation.tokcom_reconstruction import reconstruction_metrics
from tokcom_hf.metrics.text import TextJudge

RECIPES = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "tokcom_ablations.yaml"
COLUMNS = ("token_accuracy_sigma_0.7", "denoised_accuracy_t_0.3", "next_token_nats", "brier_lm_pooled", "brier_2",
           "kn_perplexity", "kn_perplexity_held_out", "entropy", "overlap_8")  # fmt: skip


@dataclass
class RunArguments:
    """Which rows, and how they are trained and measured."""

    output_dir: str = field(default="outputs/tokcom_ablations", metadata={"help": "Folder of models and table."})
    train_config: str = field(
        default="recipes/configs/tiny/train_tokcom.yaml", metadata={"help": "Configuration of the starting row."}
    )
    start: dict[str, Any] = field(default_factory=dict, metadata={"help": "Training options of all rows (budgets)."})
    rows: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "Mappings with name, and config, train, model, generate."}
    )
    generate: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of generate in all rows."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of the rows to run; none runs all."})
    num_samples: int = field(default=32, metadata={"help": "Generated rows per sampling seed."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Sampling seeds."})
    num_prefixes: int = field(default=200, metadata={"help": "Number of prefixes for BrierLM."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix."})
    draws: int = field(default=4, metadata={"help": "Continuations drawn per prefix."})


def main() -> None:
    """Trains and measures all rows; prints and saves the table."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource}, DEFAULT_CONFIG)
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    only = run.only if isinstance(run.only, list) else [run.only]
    run.seeds = run.seeds if isinstance(run.seeds, list) else [run.seeds]
    rows = [{"name": "start"}, *run.rows]
    names = [row["name"] for row in rows]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise RecipeError(f"No ablation row {', '.join(unknown)}; there are {', '.join(names)}.")
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    table_file = out / "ablations.json"
    table = json.loads(table_file.read_text(encoding="utf-8")) if table_file.is_file() else {}
    for row in rows:
        if row["name"] in table or (only and row["name"] not in [*only, "start"]):
            continue
        folder = train(row, run, source, out)
        settings = run.generate | row.get("generate", {})
        table[row["name"]] = {
            "train": row.get("train", {}),
            "generate": settings,
            **measure(folder, settings, run, source),
        }
        table_file.write_text(json.dumps(table, indent=2), encoding="utf-8")
        show(row["name"], table[row["name"]])
    print("\n" + f"{'row':24}" + "".join(f"{name:>26}" for name in COLUMNS))
    for name, result in table.items():
        show(name, result)


def train(row: dict[str, Any], run: RunArguments, source: TextSource, out: Path) -> Path:
    """Trains the row's model unless it shares that of another row; returns the model's folder."""
    overrides = row.get("train", {})
    if "model" in row:
        return out / row["model"]
    if not overrides and "config" not in row and row["name"] != "start":
        return out / "start"
    folder, stage = out / row["name"], "both"
    own_vae = "config" in row or any(key.startswith(("vae.", "vae_training.", "run.")) for key in overrides)
    if row["name"] != "start" and not own_vae:
        stage = "denoiser"
        shutil.copytree(out / "start" / "vae", folder / "vae", dirs_exist_ok=True)
    command = [sys.executable, str(RECIPES / "train_tokcom.py"), "--config", row.get("config", run.train_config)]
    command += ["--output_dir", str(folder), "--run.stage", stage, "--overwrite"]
    command += ["--run.seed", str(source.split_seed), "--validation_share", str(source.validation_share)]
    for name in ("train_file", "validation_file", "dataset_name", "dataset_config", "text_column", "max_documents"):
        if getattr(source, name) is not None:
            command += [f"--run.{name}", str(getattr(source, name))]
    command += ["--run.streaming", str(source.streaming).lower()]
    if row["name"] != "start":
        # Losses and perplexities per token can be compared only under the same tokenizer.
        command += ["--run.tokenizer", str(out / "start")]
    for key, value in (run.start | overrides).items():
        words = value if isinstance(value, list) else [value]
        # Values as the command line spells them: true, none.
        plain = (str(word).lower() if word is None or isinstance(word, bool) else str(word) for word in words)
        command += [f"--{key}", *plain]
    log = out / f"{row['name']}.log"
    print(f"training {row['name']} (log in {log})", flush=True)
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RecipeError(f"Training of row {row['name']!r} failed: {' '.join(last)} (log in {log})")
    return folder


def measure(folder: Path, settings: dict[str, Any], run: RunArguments, source: TextSource) -> dict[str, Any]:
    """Held-out accuracies, and mean and spread of the generation metrics over sampling seeds."""
    model = AutoModel.from_pretrained(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    length = model.config.max_chunks * model.config.vae.chunk_size
    data = load_source(source, length, str(folder))
    held_out = full_rows(data.validation)
    judge = TextJudge(np.asarray(data.train.token_ids, dtype=np.int64), held_out, len(data.tokenizer) + 1)
    ids = torch.from_numpy(held_out[:32])
    accuracies = reconstruction_metrics(model.vae, ids, torch.ones_like(ids), (0.0, 0.5, 0.7))
    accuracies |= denoising_metrics(model, ids, torch.ones_like(ids), (0.1, 0.3, 0.5, 0.7))
    prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, min(run.prefix_length, length // 2))
    sampler = TokComSampler(model, settings)
    generated = measure_sampler(sampler, judge, run.seeds, SamplingPlan(run.num_samples, length, prefixes, run.draws))
    if model.config.context is not None:
        accuracies["next_token_nats"] = head_losses(model, held_out)[0]
    return {"accuracies": accuracies, "generated": generated}


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a row of the table."""
    cells = []
    for key in COLUMNS:
        if key in result["generated"]:
            value = result["generated"][key]
            cells.append(f"{value['mean']:.4g} ± {value['std']:.2g}")
        else:
            value = result["accuracies"].get(key)
            cells.append("-" if value is None else f"{value:.4f}")
    print(f"{name:24}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    run_recipe(main)
