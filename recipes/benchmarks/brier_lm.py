"""BrierLM from probabilities: trained TokCom models and autoregressive baselines on the same held-out prefixes.

    python recipes/benchmarks/brier_lm.py --models outputs/tokcom --baselines outputs/ar_compute
    python recipes/benchmarks/brier_lm.py --models outputs/seed_42 outputs/seed_43 outputs/seed_44 \
        --baselines outputs/ar_42 outputs/ar_43 --train_file my.txt --validation_file held_out.txt --prefixes 6667

Name the same text (and --split_seed) as in training. Both kinds write token after token and know how likely a text is, so
that 2·p(y) − p(sample) stands for the agreement of samples, with less noise. Prints one row per model, the difference of
each pair on the same prefixes, and of the two groups with their training seeds averaged; writes `brier_lm.json` and, with
matplotlib, `brier_lm.png`.
"""

import json
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.metrics.text_brier import brier_lm_difference, brier_scores_from_log_probs, brier_summary
from tokcom_hf.metrics.text_generation import CausalSampler, TokComSampler
from tokcom_hf.metrics.text_likelihood import knows_likelihood, mean_next_token_loss
from tokcom_hf.metrics.text_protocol import held_out_prefixes
from tokcom_hf.plots_text import plot_brier_lm

# Prefixes between two movements of the progress bar.
PART = 256


@dataclass
class RunArguments:
    """Which models are compared, and how thoroughly."""

    models: list[str] = field(default_factory=lambda: ["outputs/tokcom"], metadata={"help": "TokCom folders."})
    baselines: list[str] = field(default_factory=list, metadata={"help": "Causal language models, same tokenizer."})
    output_dir: str = field(default="outputs/brier_lm", metadata={"help": "Folder of table and figure."})
    prefixes: int = field(default=1000, metadata={"help": "Held-out prefixes, evenly spaced."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix, a multiple of the chunk size."})
    draws: int = field(default=1, metadata={"help": "Continuations drawn per prefix."})
    temperatures: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Of TokCom's token distributions, a row each; the baselines' is 1."},
    )
    length: int | None = field(default=None, metadata={"help": "Tokens per row; none takes the training length."})
    seed: int = field(default=0, metadata={"help": "Sampling seed."})


def main() -> None:
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("models", "baselines", "temperatures"):
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [] if value is None else [value])
    if not run.models:
        raise RecipeError("--models needs at least one TokCom folder.")
    if run.prefixes < 2 or run.draws < 1:
        raise RecipeError(f"--prefixes must be at least 2 and --draws at least 1, got {run.prefixes} and {run.draws}.")
    first = AutoConfig.from_pretrained(run.models[0])
    if first.model_type != "tokcom":
        raise RecipeError(f"{run.models[0]!r} holds a {first.model_type!r} model, not a TokCom model.")
    chunk = first.vae.chunk_size
    if run.prefix_length < chunk or run.prefix_length % chunk:
        raise RecipeError(
            f"--prefix_length must be a positive multiple of the chunk size {chunk}, got {run.prefix_length}."
        )
    data = load_source(source, run.length or first.max_chunks * chunk, run.models[0])
    held_out, train = full_rows(data.validation), full_rows(data.train)
    given, targets = held_out_prefixes(held_out.reshape(-1), run.prefixes, run.prefix_length)
    rows: dict[str, dict[str, float]] = {}
    scores: dict[str, np.ndarray] = {}
    at = lambda folder, heat: folder if heat == 1 else f"{folder} at {heat:g}"  # noqa: E731
    for folder, heat in [*product(run.models, run.temperatures), *product(run.baselines, [1.0])]:
        started = time.perf_counter()
        model, name = load(folder, len(data.tokenizer)), at(folder, heat)
        scores[name] = score(name, model, given, targets, heat, run, data.tokenizer.eos_token_id)
        rows[name] = brier_summary(scores[name]) | {
            "parameters": model.num_parameters(),
            "next_token_loss": mean_next_token_loss(model, held_out, heat),
            "next_token_loss_train": mean_next_token_loss(model, train, heat, most=64),
            "seconds": time.perf_counter() - started,
        }
        print_row(name, rows[name], header=len(rows) == 1)
    differences = {}
    for heat in run.temperatures:
        ours = [at(model, heat) for model in run.models]
        for model, baseline in product(ours, run.baselines):
            differences[f"{model} minus {baseline}"] = brier_lm_difference(scores[model], scores[baseline])
        if len(ours) * len(run.baselines) > 1:
            means = [np.mean([scores[name] for name in group], axis=0) for group in (ours, run.baselines)]
            differences[f"TokCom's scores averaged{at('', heat)} minus the baselines'"] = brier_lm_difference(*means)
    for name, found in differences.items():
        print("{}: {difference:+.2f} ± {error:.2f}".format(name, **found))
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    result = {"settings": vars(run) | {"data": vars(source)}, "rows": rows, "differences": differences}
    (out / "brier_lm.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    plot_brier_lm(
        {name: row | {"baseline": name in run.baselines} for name, row in rows.items()}, out / "brier_lm.png"
    )
    print(f"results in {out}")


def load(folder: str, vocabulary: int) -> Any:
    """A model that knows how likely a text of `vocabulary` tokens is."""
    config = AutoConfig.from_pretrained(folder)
    tokcom = config.model_type == "tokcom"
    model = (AutoModel if tokcom else AutoModelForCausalLM).from_pretrained(folder).eval()
    own = config.vae.omni_token_id if tokcom else config.vocab_size
    if own != vocabulary:
        raise RecipeError(f"{folder!r} knows {own} tokens, the tokenizer has {vocabulary}: not the same tokenizer.")
    if not knows_likelihood(model):
        raise RecipeError(
            f"{folder!r} cannot write token after token, so it does not know probabilities: it was trained with "
            "token_time_std 0 or without block-causal attention. recipes/evaluate_tokcom.py scores samples instead."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def score(
    name: str, model: Any, given: np.ndarray, targets: np.ndarray, heat: float, run: RunArguments, start_id: int
) -> np.ndarray:
    """Brier scores (prefixes, 4) from probabilities, TokCom's at temperature `heat`."""
    sampler: Any = CausalSampler(model, start_id)
    if model.config.model_type == "tokcom":
        settings = {
            "sampler": "commit", "block_size": 1, "num_steps": model.config.vae.chunk_size,
            "posterior_temperature": heat,
        }  # fmt: skip
        sampler = TokComSampler(model, settings)
    parts = []
    bar = tqdm(range(0, len(given), PART), desc=Path(name).name, unit_scale=PART, unit=" prefixes", leave=False)
    for start in bar:
        prefixes, wanted = given[start : start + PART], targets[start : start + PART]
        # A seed of its own for each part, so that the parts' draws are independent.
        _, known = sampler.scored_continuations(
            prefixes, wanted, run.draws, wanted.shape[1], run.seed * 1_000_000 + start
        )
        parts.append(brier_scores_from_log_probs(known[:, 1:], known[:, 0]))
    return np.concatenate(parts)


def print_row(name: str, row: dict[str, float], header: bool = False) -> None:
    titles = ("parameters", "next token", "on train", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "BrierLM")
    if header:
        print(f"{'':32}" + "".join(f"{title:>12}" for title in titles))
    cells = [
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['next_token_loss']:.3f}",
        f"{row['next_token_loss_train']:.3f}",
    ]
    cells += [f"{row[f'brier_{n}']:.2f}" for n in range(1, 5)]
    cells.append(f"{row['brier_lm']:.2f} ± {row['brier_lm_error']:.2f}")
    print(f"{name[-31:]:32}" + "".join(f"{cell:>12}" for cell in cells) + f"   ({row['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    run_recipe(main)
