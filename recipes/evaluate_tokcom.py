"""Evaluates a trained TokCom folder: reconstruction, denoising, generated text, with anchors and baselines beside it.

    python recipes/evaluate_tokcom.py --model outputs/tokcom
    python recipes/evaluate_tokcom.py --model outputs/tokcom --train_file my.txt \
        --baselines outputs/ar_compute outputs/ar_tokens --output_dir outputs/evaluation
    python recipes/evaluate_tokcom.py --model outputs/tokcom --variants outputs/tokcom_paper --num_samples 256

Name the same text (and --split_seed) as in training. Prints the tables, writes `evaluation.json`, `samples.txt`, and, with
matplotlib, `accuracy_against_noise.png`, `denoising.png` and `frontier.png`. No number stands alone: perplexity is read at
its entropy, every metric beside held-out text, and 5-gram perplexity under one scorer fitted on train, one on held-out text.
"""

import json
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.metrics.denoising import denoising_metrics
from tokcom_hf.metrics.latent_path import sampling_path
from tokcom_hf.metrics.text import (
    KneserNey,
    TextJudge,
    denoise_reconstruct_accuracy,
    detailed_reconstruction,
)
from tokcom_hf.metrics.text_comparison import brier_lm_differences, compare
from tokcom_hf.metrics.text_generation import (
    CausalSampler,
    KneserNeySampler,
    Sampler,
    ShuffledChunkSampler,
    TokComSampler,
)
from tokcom_hf.metrics.text_likelihood import knows_likelihood, mean_next_token_loss
from tokcom_hf.metrics.text_protocol import frontier, held_out_prefixes, measure_sampler, summarize
from tokcom_hf.metrics.text_report import print_accuracies, print_row
from tokcom_hf.plots_text import draw_evaluation

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "evaluate_tokcom.yaml"


@dataclass
class RunArguments:
    """What is evaluated, and how thoroughly."""

    model: str = field(default="outputs/tokcom", metadata={"help": "TokCom folder."})
    variants: list[str] = field(default_factory=list, metadata={"help": "More TokCom folders of the same tokenizer."})
    baselines: list[str] = field(default_factory=list, metadata={"help": "Causal language models, same tokenizer."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of tables and figures."})
    num_samples: int = field(default=64, metadata={"help": "Generated rows per seed."})
    length: int | None = field(default=None, metadata={"help": "Tokens per row; none takes the training length."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Sampling seeds."})
    num_steps: int = field(default=16, metadata={"help": "Flow steps of the TokCom rows."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Of the TokCom rows: the decoder's (default 0), or the posterior's where tokens are predicted (1)."
        },
    )
    token_lag: float = field(default=0.0, metadata={"help": "How far tokens of a chunk wait for those left of them."})
    sampler: str | None = field(
        default=None, metadata={"help": "euler, renoise, heun or commit; none takes the model's own."}
    )
    time_grid: str = field(default="uniform", metadata={"help": "uniform, quadratic or cosine."})
    block_size: int | None = field(
        default=None, metadata={"help": "Chunks denoised together, 0 all; none: the model's own."}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance on the prompt."})
    num_prefixes: int = field(default=300, metadata={"help": "Prefixes of BrierLM."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix, a multiple of the chunk size."})
    continuation_length: int = field(default=16, metadata={"help": "Tokens generated after a prefix (4 are scored)."})
    draws: int = field(default=2, metadata={"help": "Independent continuations per prefix, at least 2."})
    frontier_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 50], metadata={"help": "Flow steps of the frontier."}
    )
    frontier_temperatures: list[float] = field(
        default_factory=list, metadata={"help": "Temperatures of the frontier; none takes 0 and 1, or 0.9 and 1."}
    )
    baseline_temperatures: list[float] = field(
        default_factory=lambda: [0.7, 0.8, 0.9, 1.0], metadata={"help": "Temperatures of the baselines' frontier."}
    )
    frontier_samples: int = field(default=32, metadata={"help": "Rows per point of the frontier."})
    block_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Rows of the block_size dial; 0 means the whole sequence."}
    )
    accuracy_rows: int = field(default=64, metadata={"help": "Held-out rows of the reconstruction metrics."})


def main() -> None:
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource}, DEFAULT_CONFIG)
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("variants", "baselines", "seeds", "frontier_steps", "frontier_temperatures", "baseline_temperatures",
                 "block_sizes"):  # fmt: skip
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [] if value is None else [value])
    if not run.seeds:
        raise RecipeError("--seeds needs at least one seed.")
    model = load_tokcom(run.model)
    chunk = model.config.vae.chunk_size
    if run.prefix_length % chunk or run.prefix_length < chunk:
        raise RecipeError(
            f"--prefix_length must be a positive multiple of the chunk size {chunk}, got {run.prefix_length}."
        )
    length = run.length or model.config.max_chunks * chunk
    data = load_source(source, length, run.model)
    if len(data.tokenizer) != model.config.vae.omni_token_id:
        raise RecipeError(
            f"The tokenizer of {run.model!r} has {len(data.tokenizer)} tokens, the model {model.config.vae.omni_token_id}."
        )
    out = Path(run.output_dir)
    train, held_out = np.asarray(data.train.token_ids, dtype=np.int64), full_rows(data.validation)
    vocabulary = len(data.tokenizer) + 1
    judge = TextJudge(train, held_out, vocabulary)
    results: dict[str, Any] = {
        "settings": vars(run) | {"data": vars(source), "length": length},
        "started": time.ctime(),
    }

    results["reconstruction"], results["denoising"] = accuracies(model, data, train, vocabulary, run)
    results["sampling_path"] = sampling_path(model, 8, length // chunk, run.num_steps)
    results["latent_std_per_dimension"] = sorted(model.latent_std.tolist())
    print_accuracies(results)

    prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, run.prefix_length)
    rows = results["rows"] = {"held-out text": real_text(judge, run)}
    print_row("held-out text", rows["held-out text"], header=True)
    samplers, parameters = all_samplers(run, model, data, judge, train, vocabulary, chunk)
    results["parameters"] = parameters
    results["next_token_loss"] = next_token_losses(samplers, held_out)
    for name, loss in results["next_token_loss"].items():
        print(f"held-out loss of the next token, {name}: {loss:.4f} nats")
    scores: dict[str, list[np.ndarray]] = {}
    for name, sampler in samplers.items():
        rows[name] = measure_sampler(
            sampler, judge, run.seeds, run.num_samples, length, prefixes, run.draws, run.continuation_length,
            scores.setdefault(name, []),
        )  # fmt: skip
        print_row(name, rows[name])
    differences = results["brier_lm_differences"] = brier_lm_differences(scores)
    for name, found in differences.items():
        print("BrierLM from probabilities, TokCom minus {}: {difference:+.3f} ± {error:.3f}".format(name, **found))

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


def load_tokcom(folder: str) -> Any:
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise RecipeError(f"No trained model in {folder!r}; run recipes/train_tokcom.py --output_dir {folder} first.")
    model = AutoModel.from_pretrained(folder)
    if model.config.model_type != "tokcom":
        raise RecipeError(f"{folder!r} holds a {model.config.model_type!r} model, not a TokCom model.")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def accuracies(model, data, train: np.ndarray, vocabulary: int, run: RunArguments) -> tuple[dict, dict]:
    """Reconstruction and denoising accuracy on held-out rows."""
    batch = [data.validation[i] for i in range(min(run.accuracy_rows, len(data.validation)))]
    ids = torch.stack([row["input_ids"] for row in batch])
    mask = torch.stack([row["attention_mask"] for row in batch])
    counts = torch.from_numpy(np.bincount(train, minlength=vocabulary))
    reconstruction = detailed_reconstruction(model.vae, ids, mask, counts)
    denoising = denoising_metrics(model, ids[:32], mask[:32], (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    denoising |= denoise_reconstruct_accuracy(model, ids[:32], mask[:32], num_steps=run.num_steps)
    return reconstruction, denoising


def all_samplers(
    run, model, data, judge, train, vocabulary: int, chunk: int
) -> tuple[dict[str, Sampler], dict[str, int]]:
    """Every generator of the table, anchors first, and the parameters of the networks among them."""
    settings = {
        "num_steps": run.num_steps, "sampler": run.sampler, "time_grid": run.time_grid, "block_size": run.block_size,
        "guidance_scale": run.guidance_scale, "token_lag": run.token_lag,
    }  # fmt: skip
    settings |= with_temperature(model, run.temperature)
    samplers: dict[str, Sampler] = {
        "unigram": KneserNeySampler(KneserNey(train, vocabulary, order=1)),
        "Kneser-Ney 5-gram": KneserNeySampler(judge.train_scorer),
        "shuffled train chunks": ShuffledChunkSampler(train, chunk),
        "TokCom, one step": TokComSampler(model, settings | {"num_steps": 1, "token_lag": 0.0}),
        f"TokCom, {run.num_steps} steps": TokComSampler(model, settings),
    }
    parameters = {"TokCom": model.num_parameters()}
    for size in run.block_sizes:
        samplers[f"TokCom, block {size or 'all'}"] = TokComSampler(model, settings | {"block_size": size})
    for folder in run.variants:
        variant = load_tokcom(folder)
        parameters[folder] = variant.num_parameters()
        # What only the first model can do is left out.
        own = {k: v for k, v in settings.items() if k not in ("temperature", "posterior_temperature", "token_lag")}
        own |= {"token_lag": run.token_lag} if variant.config.token_time_std > 0 else {}
        samplers[f"variant {Path(folder).name}"] = TokComSampler(
            variant, own | with_temperature(variant, run.temperature)
        )
    for folder in run.baselines:
        baseline = AutoModelForCausalLM.from_pretrained(folder).eval().to(model.device)
        parameters[folder] = baseline.num_parameters()
        samplers[baseline_name(folder)] = CausalSampler(baseline, data.tokenizer.eos_token_id)
    return samplers, parameters


def next_token_losses(samplers: dict[str, Sampler], held_out: np.ndarray) -> dict[str, float]:
    """Of each network that has one, on the same held-out rows."""
    networks: dict[str, Any] = {}
    for name, sampler in samplers.items():
        if isinstance(sampler, (TokComSampler, CausalSampler)) and knows_likelihood(sampler.model):
            # All rows of the first model have its weights.
            networks["TokCom" if name.startswith("TokCom, ") else name] = sampler.model
    return {name: mean_next_token_loss(model, held_out) for name, model in networks.items()}


def with_temperature(model, heat: float | None) -> dict[str, float]:
    """The setting that spreads or sharpens a model's text: the decoder's distribution, or the predicted tokens'."""
    if model.config.clean_latents == "posterior_mean":
        return {"posterior_temperature": 1.0 if heat is None else heat}
    return {"temperature": 0.0 if heat is None else heat}


def baseline_name(folder: str) -> str:
    """ "autoregressive ar (equal compute)", where recipes/train_ar_baseline.py left its budget."""
    file = Path(folder) / "budget.json"
    matched = json.loads(file.read_text(encoding="utf-8")).get("matched") if file.is_file() else None
    return f"autoregressive {Path(folder).name}" + (f" (equal {matched})" if matched else "")


def real_text(judge: TextJudge, run: RunArguments) -> dict[str, dict[str, float]]:
    """Held-out rows, as many as are generated; other rows for every seed where there are enough."""
    runs = []
    for seed in run.seeds:
        order = np.random.default_rng(seed).permutation(len(judge.held_out_rows))
        runs.append(judge.measure(judge.held_out_rows[order[: run.num_samples]]))
    return summarize(runs)


def frontiers(run: RunArguments, model, data, judge, length: int) -> dict[str, list[dict[str, Any]]]:
    """Perplexity and entropy over steps × temperature for TokCom, over temperature for the baselines."""
    report = lambda point: print("  " + "  ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)  # noqa: E731
    arguments = {
        "judge": judge,
        "count": run.frontier_samples,
        "length": length,
        "seed": run.seeds[0],
        "report": report,
    }
    common = {
        "sampler": run.sampler, "time_grid": run.time_grid, "block_size": run.block_size, "token_lag": run.token_lag,
    }  # fmt: skip
    usual = [0.9, 1.0] if model.config.clean_latents == "posterior_mean" else [0.0, 1.0]
    heats = run.frontier_temperatures or usual
    steps = run.frontier_steps
    if (run.sampler or model.config.sampler) == "commit":
        # It passes at most once over each token of a chunk: more steps are the same samples.
        steps = sorted({min(count, model.config.vae.chunk_size) for count in steps})
    grid = [{"temperature": heat, "num_steps": count} for heat, count in product(heats, steps)]

    def sampler(temperature: float, num_steps: int) -> TokComSampler:
        return TokComSampler(model, common | {"num_steps": num_steps} | with_temperature(model, temperature))

    print("\nfrontier of TokCom")
    curves = {"TokCom": frontier(sampler, grid, **arguments)}
    for folder in run.baselines:
        baseline = AutoModelForCausalLM.from_pretrained(folder).eval().to(model.device)
        name = baseline_name(folder)
        print(f"frontier of {name}")
        points = [{"temperature": heat} for heat in run.baseline_temperatures]
        make = lambda net: lambda **point: CausalSampler(net, data.tokenizer.eos_token_id, **point)  # noqa: E731
        curves[name] = frontier(make(baseline), points, **arguments)
    return curves


def write_samples(out: Path, samplers, data, held_out: np.ndarray, run: RunArguments, length: int) -> None:
    """One row of every generator, to be read."""
    texts = [("held-out text", held_out[0])]
    texts += [(name, sampler.rows(1, length, run.seeds[0])[0]) for name, sampler in samplers.items()]
    text = "\n\n".join(f"=== {name}\n{data.tokenizer.decode(ids)}" for name, ids in texts)
    (out / "samples.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
