"""BrierLM of trained TokCom models, of their heads alone and of autoregressive baselines, on the same held-out prefixes.

    python recipes/benchmarks/brier_lm.py --models outputs/tokcom --baselines outputs/ar_compute
    python recipes/benchmarks/brier_lm.py --models outputs/seed_42 outputs/seed_43 outputs/seed_44 \
        --baselines outputs/ar_42 outputs/ar_43 outputs/ar_44 --train_file train.txt --validation_file test.txt \
        --prefixes 6000 --draws 16

Name the same text (and --split_seed) as in training; choose on development text, report on test text, once. A flow gives no
probability of a text, so its score is estimated from independent draws after each prefix; many are needed, because few draws
agree in four tokens. Baselines and the heads alone give probabilities, from which the same score follows with less noise.
Prints one row per model, the paired difference of TokCom to each other row with its 95 % interval (bootstrap over blocks of
neighbouring prefixes), and this difference with the scores averaged over the training seeds of each kind. Writes
`brier_lm.json` and, with matplotlib, `brier_lm.png`.
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
from tokcom_hf.evaluation.text_comparison import difference_line
from tokcom_hf.evaluation.text_generation import (
    CausalSampler,
    HeadSampler,
    Sampler,
    TokComSampler,
    tokens_behind_prefix,
)
from tokcom_hf.evaluation.text_likelihood import head_losses, mean_next_token_loss
from tokcom_hf.evaluation.text_protocol import held_out_prefixes
from tokcom_hf.metrics.text_brier import (
    brier_lm_difference,
    brier_scores,
    brier_scores_from_log_probs,
    brier_summary,
)
from tokcom_hf.plots.text import plot_brier_lm

# Prefixes scored together, and per step of the progress bar.
PART = 256
# Rows drawn together. TokCom is fastest on a CPU where what it keeps between two small steps stays in the caches.
BATCH = 128
KINDS = ("TokCom", "heads alone", "autoregressive")


@dataclass
class RunArguments:
    """Which models are compared, and how thoroughly."""

    models: list[str] = field(default_factory=lambda: ["outputs/tokcom"], metadata={"help": "TokCom folders."})
    baselines: list[str] = field(default_factory=list, metadata={"help": "Causal language models, same tokenizer."})
    output_dir: str = field(default="outputs/brier_lm", metadata={"help": "Folder of table and figure."})
    prefixes: int = field(default=1000, metadata={"help": "Held-out prefixes, evenly spaced."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix, a multiple of the chunk size."})
    draws: int = field(default=8, metadata={"help": "Continuations drawn per prefix, at least 2."})
    num_steps: int | None = field(default=None, metadata={"help": "Flow steps of TokCom; none: each model's own."})
    temperature: float = field(default=1.0, metadata={"help": "Factor of TokCom's noise."})
    best_of: int = field(default=1, metadata={"help": "Draws per block; the most consistent one is kept."})
    length: int | None = field(default=None, metadata={"help": "Tokens per row; none takes the training length."})
    seed: int = field(default=0, metadata={"help": "Sampling seed."})


def main() -> None:
    """Scores all models on the same prefixes; prints and saves scores and differences."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("models", "baselines"):
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [] if value is None else [value])
    if not run.models:
        raise RecipeError("--models needs at least one TokCom folder.")
    if run.prefixes < 2 or run.draws < 2:
        raise RecipeError(f"--prefixes and --draws must be at least 2, got {run.prefixes} and {run.draws}.")
    first = AutoConfig.from_pretrained(run.models[0])
    if first.model_type != "tokcom":
        raise RecipeError(f"{run.models[0]!r} holds a {first.model_type!r} model, not a TokCom model.")
    chunk = first.vae.chunk_size
    if run.prefix_length < chunk or run.prefix_length % chunk:
        raise RecipeError(
            f"--prefix_length must be a positive multiple of the chunk size {chunk}, got {run.prefix_length}."
        )
    data = load_source(source, run.length or first.max_chunks * chunk, run.models[0])
    held_out = full_rows(data.validation)
    given, targets = held_out_prefixes(held_out.reshape(-1), run.prefixes, run.prefix_length)
    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, np.ndarray] = {}
    for folder in dict.fromkeys([*run.models, *run.baselines]):
        model = load(folder, len(data.tokenizer))
        nats = held_out_nats(model, held_out)
        for name, kind, sampler in samplers(folder, model, run, data.tokenizer.eos_token_id):
            started = time.perf_counter()
            scores[name] = score(name, sampler, given, targets, run)
            rows[name] = brier_summary(scores[name]) | {
                "kind": kind,
                "parameters": model.num_parameters(),
                "next_token_nats": nats,
                "seconds": time.perf_counter() - started,
            }
            print_row(name, rows[name], header=len(rows) == 1)
    differences = {}
    groups = {kind: [name for name, row in rows.items() if row["kind"] == kind] for kind in KINDS}
    for kind in KINDS[1:]:
        for ours, other in product(groups["TokCom"], groups[kind]):
            if kind == "autoregressive" or other == f"{ours}, heads alone":
                differences[f"{ours} minus {other}"] = brier_lm_difference(scores[ours], scores[other])
                print(difference_line(other, differences[f"{ours} minus {other}"]).replace("TokCom", ours, 1))
        if groups[kind] and len(groups["TokCom"]) * len(groups[kind]) > 1:
            means = [np.mean([scores[name] for name in groups[group]], axis=0) for group in ("TokCom", kind)]
            found = differences[f"TokCom minus {kind}, seeds averaged"] = brier_lm_difference(*means)
            print(difference_line(f"{kind}, seeds averaged", found))
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    result = {"settings": vars(run) | {"data": vars(source)}, "rows": rows, "differences": differences}
    (out / "brier_lm.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    plot_brier_lm(rows, out / "brier_lm.png")
    print(f"results in {out}")


def load(folder: str, vocabulary: int) -> Any:
    """A TokCom or causal language model of `vocabulary` tokens."""
    config = AutoConfig.from_pretrained(folder)
    tokcom = config.model_type == "tokcom"
    own = config.vae.omni_token_id if tokcom else config.vocab_size
    if own != vocabulary:
        raise RecipeError(
            f"{folder!r} has a vocabulary of {own} tokens, the tokenizer has {vocabulary}; "
            "compare models of the same tokenizer."
        )
    model = (AutoModel if tokcom else AutoModelForCausalLM).from_pretrained(folder).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def held_out_nats(model: Any, held_out: np.ndarray) -> float | None:
    """Held-out next-token loss in nats: a baseline's, or that of TokCom's first auxiliary head (None without heads)."""
    if model.config.model_type != "tokcom":
        return mean_next_token_loss(model, held_out)
    return None if model.config.context is None else head_losses(model, held_out)[0]


def samplers(folder: str, model: Any, run: RunArguments, start_id: int) -> list[tuple[str, str, Sampler]]:
    """(name, kind, sampler) of each row that one folder gives."""
    if model.config.model_type != "tokcom":
        return [(folder, "autoregressive", CausalSampler(model, start_id, batch_size=BATCH))]
    settings = {"num_steps": run.num_steps, "temperature": run.temperature, "best_of": run.best_of}
    found: list[tuple[str, str, Sampler]] = [(folder, "TokCom", TokComSampler(model, settings, batch_size=BATCH))]
    if model.config.context is not None:
        found.append((f"{folder}, heads alone", "heads alone", HeadSampler(model, batch_size=BATCH)))
    return found


def score(name: str, sampler: Sampler, given: np.ndarray, targets: np.ndarray, run: RunArguments) -> np.ndarray:
    """Brier scores (prefixes, 4): from probabilities if the sampler gives them, otherwise from its draws."""
    parts = []
    bar = tqdm(range(0, len(given), PART), desc=Path(name).name, unit_scale=PART, unit=" prefixes", leave=False)
    for start in bar:
        prefixes, wanted = given[start : start + PART], targets[start : start + PART]
        # A seed of its own for each part, so that the parts' draws are independent.
        drawn, log_probs = sampler.scored_continuations(
            prefixes, wanted, run.draws, tokens_behind_prefix(sampler, wanted.shape[1]), run.seed * 1_000_000 + start
        )
        from_log_probs = None if log_probs is None else brier_scores_from_log_probs(log_probs[:, 1:], log_probs[:, 0])
        parts.append(brier_scores(drawn, wanted) if from_log_probs is None else from_log_probs)
    return np.concatenate(parts)


def print_row(name: str, row: dict[str, Any], header: bool = False) -> None:
    """Prints a model's scores; `header` prints the column titles first."""
    titles = ("parameters", "next nats", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "BrierLM")
    if header:
        print(f"{'':40}" + "".join(f"{title:>12}" for title in titles))
    nats = row["next_token_nats"]
    cells = [f"{row['parameters'] / 1e6:.1f} M", "-" if nats is None else f"{nats:.3f}"]
    cells += [f"{row[f'brier_{n}']:.2f}" for n in range(1, 5)]
    cells.append(f"{row['brier_lm']:.2f} ± {row['brier_lm_error']:.2f}")
    print(f"{name[-39:]:40}" + "".join(f"{cell:>12}" for cell in cells) + f"   ({row['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    run_recipe(main)
