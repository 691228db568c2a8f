"""Nats per token that drawn chunks cost autoregressive judges, at each place of the chunk: where a chunk is weakest.

    python recipes/benchmarks/nats_by_place.py --models outputs/tokcom --judges outputs/ar_compute
    python recipes/benchmarks/nats_by_place.py --models outputs/tokcom --judges outputs/ar_42 outputs/ar_43 \
        --num_steps 8 4 2 1 --prefixes 1000 --train_file train.txt --validation_file development.txt

Each sampler draws one chunk after the same held-out prefixes. The judges' log-probabilities of its tokens, averaged over
judges, draws and prefixes, say how well each token follows the ones before it; the entropy of the drawn tokens says how
varied they are, and a cost is read at its entropy. Rows: held-out text, each TokCom at each number of steps, its heads
alone, its context alone, token after token without a flow, and the judges' own draws. Judges and models must have been
trained on the same text with the same tokenizer.

The draws of a TokCom are also held against its own context, which predicts each token from all tokens before it: what an
exact flow would draw from. The row of the context alone shows what chance makes of exact draws. Prints the rows and writes
`nats_by_place.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.text_generation import (
    CausalSampler,
    HeadSampler,
    Sampler,
    TokComSampler,
    tokens_behind_prefix,
)
from tokcom_hf.evaluation.text_likelihood import causal_log_probs
from tokcom_hf.evaluation.text_protocol import held_out_prefixes
from tokcom_hf.evaluation.tokcom_exactness import ContextSampler, against_context
from tokcom_hf.metrics.text_diversity import unigram_entropy

# Prefixes per step of the progress bar, and rows drawn together.
PART, BATCH = 256, 128


@dataclass
class RunArguments:
    """Which models draw, which judge, and how thoroughly."""

    models: list[str] = field(default_factory=lambda: ["outputs/tokcom"], metadata={"help": "TokCom folders."})
    judges: list[str] = field(default_factory=list, metadata={"help": "Causal language models, same tokenizer."})
    output_dir: str = field(default="outputs/nats_by_place", metadata={"help": "Folder of the table."})
    num_steps: list[int | None] = field(
        default_factory=lambda: [None], metadata={"help": "Flow steps of TokCom; none: each model's own."}
    )
    prefixes: int = field(default=1000, metadata={"help": "Held-out prefixes, evenly spaced."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix, a multiple of the chunk size."})
    draws: int = field(default=4, metadata={"help": "Chunks drawn per prefix."})
    seed: int = field(default=0, metadata={"help": "Sampling seed."})


def main() -> None:
    """Draws with every model, judges, prints and saves the rows."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("models", "judges", "num_steps"):
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [value])
    if not run.models or not run.judges:
        raise RecipeError("--models needs at least one TokCom folder, and --judges one causal language model.")
    configs = {folder: AutoConfig.from_pretrained(folder) for folder in [*run.models, *run.judges]}
    for folder in run.models:
        if configs[folder].model_type != "tokcom":
            raise RecipeError(f"{folder!r} holds a {configs[folder].model_type!r} model, not a TokCom model.")
    vae = configs[run.models[0]].vae
    if min(run.prefixes, run.draws) < 1 or run.prefix_length < 1 or run.prefix_length % vae.chunk_size:
        raise RecipeError(
            f"--prefixes and --draws must be at least 1, --prefix_length a multiple of the chunk size {vae.chunk_size}; "
            f"got {run.prefixes}, {run.draws} and {run.prefix_length}."
        )
    data = load_source(source, configs[run.models[0]].max_chunks * vae.chunk_size, run.models[0])
    sizes = {name: c.vae.omni_token_id if c.model_type == "tokcom" else c.vocab_size for name, c in configs.items()}
    if set(sizes.values()) != {len(data.tokenizer)}:
        raise RecipeError(
            f"Models and judges must share the tokenizer of {len(data.tokenizer)} tokens; they have {sizes}."
        )
    given, true = held_out_prefixes(
        full_rows(data.validation).reshape(-1), run.prefixes, run.prefix_length, vae.chunk_size
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judges = {name: AutoModelForCausalLM.from_pretrained(name).eval().to(device) for name in run.judges}
    rows = {"held-out text": judged(true[:, None], given, judges)}
    print_row("held-out text", rows["held-out text"], header=True)
    for name, sampler in samplers(run, judges, data.tokenizer.eos_token_id, device):
        drawn = draw(name, sampler, given, vae.chunk_size, run)
        rows[name] = judged(drawn, given, judges)
        if isinstance(sampler, TokComSampler | HeadSampler | ContextSampler) and sampler.model.context is not None:
            rows[name] |= against_context(sampler.model, given, drawn)
        print_row(name, rows[name])
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    result = {"settings": vars(run) | {"data": vars(source)}, "rows": rows}
    (out / "nats_by_place.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(f"results in {out}")


def samplers(run: RunArguments, judges: dict[str, Any], start_id: int, device: str) -> list[tuple[str, Sampler]]:
    """(name, sampler) of each row but that of the held-out text."""
    found: list[tuple[str, Sampler]] = []
    for folder in run.models:
        model = AutoModel.from_pretrained(folder).eval().to(device)
        for steps in run.num_steps:
            steps = steps or model.config.num_steps
            sampler = TokComSampler(model, {"num_steps": steps}, batch_size=BATCH)
            found.append((f"{folder}, {steps} step{'s' * (steps > 1)}", sampler))
        if model.config.context is not None:
            found.append((f"{folder}, heads alone", HeadSampler(model, batch_size=BATCH)))
            found.append((f"{folder}, context alone", ContextSampler(model, batch_size=BATCH)))
    return found + [(name, CausalSampler(judge, start_id, batch_size=BATCH)) for name, judge in judges.items()]


def draw(name: str, sampler: Sampler, given: np.ndarray, length: int, run: RunArguments) -> np.ndarray:
    """Ids (prefixes, draws, length) drawn after the prefixes; each part of them has a seed of its own."""
    parts = []
    behind = tokens_behind_prefix(sampler, length)
    for start in tqdm(
        range(0, len(given), PART), desc=Path(name).name, unit_scale=PART, unit=" prefixes", leave=False
    ):
        seed = run.seed * 1_000_000 + start
        parts.append(sampler.continuations(given[start : start + PART], run.draws, behind, seed)[..., :length])
    return np.concatenate(parts)


def judged(drawn: np.ndarray, given: np.ndarray, judges: dict[str, Any]) -> dict[str, Any]:
    """Nats of drawn tokens (prefixes, draws, length): mean, its standard error over prefixes, at each place, by judge."""
    ids = torch.from_numpy(given), torch.from_numpy(np.ascontiguousarray(drawn))
    nats = {name: -causal_log_probs(judge, *ids).double().numpy() for name, judge in judges.items()}
    mean = np.mean(list(nats.values()), axis=0)
    of_prefixes = mean.mean(axis=(1, 2))
    return {
        "nats": float(of_prefixes.mean()),
        "nats_error": float(of_prefixes.std(ddof=1) / np.sqrt(len(of_prefixes))) if len(of_prefixes) > 1 else None,
        "nats_by_place": mean.mean(axis=(0, 1)).tolist(),
        "nats_by_judge": {name: float(found.mean()) for name, found in nats.items()},
        "entropy": unigram_entropy(drawn.reshape(-1, drawn.shape[-1])),
        "prefixes": len(given),
    }


def print_row(name: str, row: dict[str, Any], header: bool = False) -> None:
    """Prints the nats of a row; `header` prints the column titles first."""
    places = row["nats_by_place"]
    if header:
        print(f"{'nats per token':40}" + "".join(f"{f'token {i + 1}':>10}" for i in range(len(places))) + "    all")
    error = "" if row["nats_error"] is None else f" ± {row['nats_error']:.2f}"
    cells = "".join(f"{value:>10.2f}" for value in places)
    print(f"{name[-39:]:40}{cells}    {row['nats']:.2f}{error} @ {row['entropy']:.2f}", flush=True)
    for key, title in (("excess", "nats above the context's entropy"), ("hits", "100 · (p − Σ p²) of the context")):
        if key in row:
            cells = "".join(f"{value:>+10.2f}" for value in row[key])
            error = "" if row[key + "_error"] is None else f"    ± {max(row[key + '_error']):.2f}"
            print(f"{'  ' + title:40}{cells}{error}", flush=True)


if __name__ == "__main__":
    run_recipe(main)
