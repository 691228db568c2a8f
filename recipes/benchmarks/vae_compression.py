"""Measures how far text can be compressed: VAEs of several chunk sizes and vocabularies, under latent noise.

    python recipes/benchmarks/vae_compression.py                                          # 2:1, 4:1, 8:1, embedded text
    python recipes/benchmarks/vae_compression.py --train_file train.txt --validation_file test.txt --chunk_sizes 4 8 \
        --tokenizers none gpt2

Each row trains the VAE stage of recipes/train_tokcom.py with another chunk size or tokenizer, all else equal, and measures
it on held-out text beside its control, an untrained VAE of the same shape. `none` trains a tokenizer on the corpus. Prints
the table, writes `vae_compression.json` and, with matplotlib, one curve per row to `accuracy_against_noise.png`. Finished
rows are kept, so an interrupted run continues.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, set_seed

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.tokcom_reconstruction import detailed_reconstruction

RECIPES = Path(__file__).resolve().parents[1]
SIGMAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
CONTROL_SIGMAS = (0.0, 0.5, 0.7, 1.0)
# Heading of a column -> key of its measure.
COLUMNS = {
    "sigma 0": "token_accuracy",
    "0.5": "token_accuracy_sigma_0.5",
    "0.7": "token_accuracy_sigma_0.7",
    "1.0": "token_accuracy_sigma_1",
    "chunks": "chunk_accuracy",
    "rare": "rare_token_accuracy",
    "random": "random_token_accuracy",
}


@dataclass
class RunArguments:
    """Which VAEs are trained."""

    output_dir: str = field(default="outputs/vae_compression", metadata={"help": "Folder of models and table."})
    train_config: str = field(
        default=str(RECIPES / "configs" / "vae" / "train_tokcom.yaml"),
        metadata={"help": "Training configuration of all rows."},
    )
    chunk_sizes: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Tokens per latent."})
    tokenizers: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Names or folders; none trains one on the corpus."}
    )
    length: int = field(default=256, metadata={"help": "Tokens per row, a multiple of every chunk size."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Training steps of each VAE; none: the configuration's."}
    )
    options: list[str] = field(
        default_factory=list,
        metadata={"help": "More options of train_tokcom.py as name=value, for example vae.latent_size=64."},
    )
    rows: int = field(default=64, metadata={"help": "Held-out rows the accuracies are measured on."})


def main() -> None:
    """Trains and measures all rows; prints, saves and draws them."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("chunk_sizes", "tokenizers", "options"):
        value = getattr(run, name)
        # `--tokenizers none` alone arrives as None and means a tokenizer trained on the corpus.
        setattr(run, name, value if isinstance(value, list) else ["none" if value is None else value])
    for size in run.chunk_sizes:
        if size < 1 or run.length % size:
            raise RecipeError(f"--length must be a multiple of every chunk size, got {run.length} and {size}.")
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    table_file = out / "vae_compression.json"
    table = json.loads(table_file.read_text(encoding="utf-8")) if table_file.is_file() else {}
    for tokenizer, size in product(["none" if name is None else name for name in run.tokenizers], run.chunk_sizes):
        name = f"{size}to1_{Path(tokenizer).name if tokenizer != 'none' else 'own'}"
        if name not in table:
            train(out, name, size, tokenizer, run, source)
            table[name] = measure(out / name / "vae", size, run, source)
            table_file.write_text(json.dumps(table, indent=2), encoding="utf-8")
    print_table(table)
    draw(out, table)


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """Prints held-out accuracies in percent, of each row and, below it, of its control."""
    print("\nheld-out accuracy in %: of tokens at latent noise of sigma standard deviations; of whole chunks;\n"
          "of rare tokens (at most 10 times in training); of tokens in chunks of random tokens")  # fmt: skip
    header = f"{'row':24}{'vocabulary':>11}{'latent':>9}{'parameters':>12}"
    print(header + "".join(f"{name:>9}" for name in COLUMNS))
    for name, row in table.items():
        shape = f"{row['vocabulary']:>11,}{row['latent_size']:>9}{row['parameters']:>12,}"
        for label, values in ((f"{name:24}{shape}", row), (f"{'  untrained':56}", row["untrained"])):
            print(label + "".join(f"{100 * values[column]:>9.3f}" for column in COLUMNS.values()))


def train(out: Path, name: str, size: int, tokenizer: str, run: RunArguments, source: TextSource) -> None:
    """Runs the VAE stage of train_tokcom.py in a new process, so that all rows start from the same state."""
    command = [sys.executable, str(RECIPES / "train_tokcom.py"), "--config", run.train_config, "--run.stage", "vae"]
    command += ["--output_dir", str(out / name), "--overwrite", "--run.length", str(run.length)]
    command += ["--vae.chunk_size", str(size)]
    if run.max_steps is not None:
        command += ["--vae_training.max_steps", str(run.max_steps)]
    command += ["--run.seed", str(source.split_seed), "--validation_share", str(source.validation_share)]
    command += ["--vae_training.eval_strategy", '"no"', "--vae_training.load_best_model_at_end", "false"]
    command += ["--sample_every", "0"]
    if tokenizer != "none":
        command += ["--run.tokenizer", tokenizer]
    for option in ("train_file", "validation_file", "dataset_name", "dataset_config", "text_column", "max_documents"):
        if getattr(source, option) is not None:
            command += [f"--run.{option}", str(getattr(source, option))]
    for option in run.options:
        key, equals, value = str(option).partition("=")
        if not equals:
            raise RecipeError(f"--options takes name=value, got {option!r}.")
        command += [f"--{key}", value]
    log = out / f"{name}.log"
    print(f"training {name} (log in {log})", flush=True)
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RecipeError(f"Training of row {name!r} failed: {' '.join(last)} (log in {log})")


def measure(folder: Path, size: int, run: RunArguments, source: TextSource) -> dict[str, Any]:
    """Every reconstruction metric on held-out rows, of a trained VAE and of one with its initial weights."""
    trained = AutoModel.from_pretrained(folder)
    set_seed(source.split_seed)
    untrained = type(trained)(trained.config)
    data = load_source(source, run.length, str(folder))
    counts = np.bincount(np.asarray(data.train.token_ids, dtype=np.int64), minlength=len(data.tokenizer) + 1)
    ids = torch.from_numpy(full_rows(data.validation)[: run.rows])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metrics, control = (
        detailed_reconstruction(vae.eval().to(device), ids, torch.ones_like(ids), torch.from_numpy(counts), sigmas)
        for vae, sigmas in ((trained, SIGMAS), (untrained, CONTROL_SIGMAS))
    )
    training = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    row = {"chunk_size": size, "latent_size": trained.config.latent_size, "vocabulary": len(data.tokenizer)}
    row |= {"parameters": trained.num_parameters(), "steps": training["steps"], "seconds": training["seconds"]}
    return row | metrics | {"untrained": control}


def draw(out: Path, table: dict[str, dict[str, Any]]) -> None:
    """Draws accuracy against noise, if matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('No figure: matplotlib is not installed (pip install "tokcom_hf[plots]").')
        return
    from tokcom_hf.plots.text import plot_noise_curves

    plot_noise_curves(table, out / "accuracy_against_noise.png")
    print(f"table and figure in {out}")


if __name__ == "__main__":
    run_recipe(main)
