"""How far text can be squeezed: VAEs at several chunk sizes and vocabularies, accuracy against latent noise.

    python recipes/benchmarks/vae_compression.py                                          # 2:1, 4:1, 8:1, embedded text
    python recipes/benchmarks/vae_compression.py --train_file my.txt --chunk_sizes 4 8 \
        --tokenizers none gpt2 --max_steps 2000

Each row trains the VAE stage of recipes/train_tokcom.py, alike but for chunk size and tokenizer, and measures it
on held-out text. `none` trains a tokenizer on the corpus. Prints the table, writes `vae_compression.json` and, with
matplotlib, one curve per row to `accuracy_against_noise.png`. Finished rows are kept, so an interrupted run goes on.
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
from transformers import AutoModel

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.metrics.text import detailed_reconstruction

RECIPES = Path(__file__).resolve().parents[1]
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
COLUMNS = ("token_accuracy", "chunk_accuracy", "sequence_accuracy", "rare_token_accuracy", "random_token_accuracy",
           "token_accuracy_sigma_0.3", "token_accuracy_sigma_0.5")  # fmt: skip


@dataclass
class RunArguments:
    """Which VAEs are trained."""

    output_dir: str = field(default="outputs/vae_compression", metadata={"help": "Folder of models and table."})
    train_config: str = field(
        default="recipes/configs/latent/train_tokcom.yaml", metadata={"help": "Configuration of everything else."}
    )
    chunk_sizes: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Tokens per latent."})
    tokenizers: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Names or folders; none trains one on the corpus."}
    )
    length: int = field(default=256, metadata={"help": "Tokens per row, a multiple of every chunk size."})
    max_steps: int = field(default=450, metadata={"help": "Training steps of each VAE."})
    options: list[str] = field(
        default_factory=list,
        metadata={"help": "More options of train_tokcom.py as name=value, for example vae.latent_size=64."},
    )
    rows: int = field(default=64, metadata={"help": "Held-out rows the accuracies are measured on."})


def main() -> None:
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("chunk_sizes", "tokenizers", "options"):
        value = getattr(run, name)
        # A lone `none` on the command line is the tokenizer trained on the corpus.
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
    print(f"\n{'row':20}{'vocabulary':>12}{'parameters':>13}" + "".join(f"{column:>26}" for column in COLUMNS))
    for name, row in table.items():
        cells = "".join(f"{row[column]:>26.5f}" for column in COLUMNS)
        print(f"{name:20}{row['vocabulary']:>12,}{row['parameters']:>13,}{cells}")
    draw(out, table)


def train(out: Path, name: str, size: int, tokenizer: str, run: RunArguments, source: TextSource) -> None:
    """The VAE stage of train_tokcom.py in a process of its own, so that every row starts alike."""
    command = [sys.executable, str(RECIPES / "train_tokcom.py"), "--config", run.train_config, "--run.stage", "vae"]
    command += ["--output_dir", str(out / name), "--overwrite", "--run.length", str(run.length)]
    command += ["--vae.chunk_size", str(size), "--vae_training.max_steps", str(run.max_steps)]
    command += ["--run.seed", str(source.split_seed), "--validation_share", str(source.validation_share)]
    command += ["--vae_training.eval_strategy", '"no"', "--vae_training.load_best_model_at_end", "false"]
    command += ["--sample_every", "0"]
    if tokenizer != "none":
        command += ["--run.tokenizer", tokenizer]
    for option in ("train_file", "dataset_name", "dataset_config", "text_column", "max_documents"):
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
    """Every reconstruction metric of a trained VAE on held-out rows."""
    vae = AutoModel.from_pretrained(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    data = load_source(source, run.length, str(folder))
    counts = np.bincount(np.asarray(data.train.token_ids, dtype=np.int64), minlength=len(data.tokenizer) + 1)
    ids = torch.from_numpy(full_rows(data.validation)[: run.rows])
    metrics = detailed_reconstruction(vae, ids, torch.ones_like(ids), torch.from_numpy(counts), SIGMAS)
    shape = {"chunk_size": size, "vocabulary": len(data.tokenizer), "parameters": vae.num_parameters()}
    return shape | metrics


def draw(out: Path, table: dict[str, dict[str, Any]]) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('No figure: matplotlib is not installed (pip install "tokcom_hf[plots]").')
        return
    from tokcom_hf.plots_text import plot_noise_curves

    plot_noise_curves(table, out / "accuracy_against_noise.png")
    print(f"table and figure in {out}")


if __name__ == "__main__":
    run_recipe(main)
