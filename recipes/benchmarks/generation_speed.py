"""Seconds per generated row: TokCom against an autoregressive Llama of equal size with KV cache, in one run.

    python recipes/benchmarks/generation_speed.py                                  # random weights: speed alone
    python recipes/benchmarks/generation_speed.py --model outputs/tokcom --baseline outputs/ar_compute \
        --train_file train.txt --validation_file development.txt --num_prefixes 1000

On one core by default (`--threads`). Runs alternate (A B A B ...) and medians are compared. With trained models the quality
of the timed rows (5-gram perplexity, entropy, and BrierLM with `--num_prefixes`) is measured too. With random weights only
speed is measured, which does not depend on the weights.
"""

import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_throughput import flow_settings
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.text_generation import CausalSampler, TokComSampler, tokens_behind_prefix
from tokcom_hf.evaluation.text_protocol import held_out_prefixes
from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.metrics.text import TextJudge
from tokcom_hf.metrics.text_brier import brier_scores, brier_scores_from_log_probs, brier_summary

Contestant = TokComSampler | CausalSampler
QUALITY = ("kn_perplexity", "kn_perplexity_held_out", "entropy", "overlap_8")


@dataclass
class RunArguments:
    """What is timed."""

    model: str | None = field(default=None, metadata={"help": "TokCom folder; none builds one with random weights."})
    baseline: str | None = field(default=None, metadata={"help": "Causal model; none builds a Llama of equal size."})
    output_dir: str = field(default="outputs/generation_speed", metadata={"help": "Folder of the JSON."})
    tokens: int = field(default=1024, metadata={"help": "Tokens per row."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows generated together."})
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 8], metadata={"help": "Flow steps per block."})
    block_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "Chunks denoised together; 0 means the whole row."}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads of both models; 0 keeps torch's own number."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a TokCom with random weights."})
    context_layers: int = field(default=4, metadata={"help": "Context layers of that TokCom."})
    denoiser_layers: int = field(default=2, metadata={"help": "Denoiser layers of that TokCom."})
    vocab_size: int = field(default=4097, metadata={"help": "Vocabulary of models with random weights."})
    temperature: float = field(default=1.0, metadata={"help": "Factor of TokCom's noise."})
    sampler: str | None = field(
        default=None, metadata={"help": "euler, heun, multistep, multirate or renoise; none: the model's own."}
    )
    repeats: int = field(default=3, metadata={"help": "Timed runs of each model, alternating, after one warm-up run."})
    num_prefixes: int = field(
        default=0, metadata={"help": "Prefixes for BrierLM of trained models; 0 for no BrierLM."}
    )
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix."})
    draws: int = field(default=8, metadata={"help": "Continuations per prefix."})


@dataclass
class Quality:
    """Scorers of the timed rows, and held-out prefixes with their continuations."""

    judge: TextJudge
    prefixes: tuple[np.ndarray, np.ndarray] | None


def main() -> None:
    """Times all settings against the baseline; prints and saves the rows."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    for name in ("batch_sizes", "num_steps", "block_sizes"):
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [value])
    if run.repeats < 1 or run.threads < 0:
        raise RecipeError(
            f"--repeats must be at least 1 and --threads not negative, got {run.repeats}, {run.threads}."
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    tokcom, baseline = load_models(run)
    quality = load_quality(run, source, tokcom)
    start_id = int(baseline.config.eos_token_id or 0)
    sizes = {"TokCom": tokcom.num_parameters(), "autoregressive": baseline.num_parameters()}
    device = str(tokcom.device)
    print(f"{sizes} parameters; {run.tokens} tokens per row; {device}, {torch.get_num_threads()} threads")
    if run.model and tokcom.config.max_chunks * tokcom.config.vae.chunk_size < run.tokens:
        print(f"note: TokCom was trained on rows of {tokcom.config.max_chunks * tokcom.config.vae.chunk_size} tokens")
    blocks = run.block_sizes
    if tokcom.config.context is None:
        print("note: this TokCom has no context, so it denoises the whole row as one block")
        blocks = [0]
    rows = []
    for batch in run.batch_sizes:
        for block in blocks:
            for steps in run.num_steps:
                settings = {
                    "num_steps": steps, "block_size": block, "temperature": run.temperature, "sampler": run.sampler,
                }  # fmt: skip
                contestants: dict[str, Contestant] = {
                    "autoregressive": CausalSampler(baseline, start_id, batch_size=batch),
                    "TokCom": TokComSampler(tokcom, settings, batch_size=batch),
                }
                timed = alternate(contestants, batch, run.tokens, run.repeats)
                row = {"batch": batch, "block_size": block, "num_steps": steps}
                row |= {f"{name} seconds": statistics.median(seconds) for name, (seconds, _) in timed.items()}
                row |= {f"{name} tokens/s": batch * run.tokens / row[f"{name} seconds"] for name in timed}
                row["speedup"] = row["autoregressive seconds"] / row["TokCom seconds"]
                if quality is not None:
                    for name, (_, samples) in timed.items():
                        found = measure(contestants[name], np.concatenate(samples), quality, run)
                        row |= {f"{name} {key}": value for key, value in found.items()}
                rows.append(row)
                print("  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    if quality is None:
        print("Quality was not measured: that needs trained models, --model and --baseline, and their text.")
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    result = {"parameters": sizes, "device": device, "threads": torch.get_num_threads(), "rows": rows}
    (out / "generation_speed.json").write_text(
        json.dumps(result | {"settings": vars(run)}, indent=2), encoding="utf-8"
    )
    print(f"results in {out}")


def load_models(run: RunArguments) -> tuple[Any, Any]:
    """The two models, trained or of equal size with random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.model is not None:
        tokcom = AutoModel.from_pretrained(run.model)
    else:
        heads = run.hidden_size // 64
        width = {
            "hidden_size": run.hidden_size, "num_attention_heads": heads, "num_key_value_heads": heads,
            "intermediate_size": 3 * run.hidden_size,
        }  # fmt: skip
        vae = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128}
        tokcom = TokComModel(
            TokComConfig(
                vae=vae | {"vocab_size": run.vocab_size, "latent_size": 128, "num_hidden_layers": 2},
                denoiser=width | {"num_hidden_layers": run.denoiser_layers},
                context=width | {"num_hidden_layers": run.context_layers, "max_position_embeddings": run.tokens + 1},
                **flow_settings() | {"block_sizes": [1, 4, 16]},
            )
        )
    if run.baseline is not None:
        baseline = AutoModelForCausalLM.from_pretrained(run.baseline)
    else:
        config = matching_llama_config(
            tokcom.num_parameters(), tokcom.config.vae.omni_token_id, head_dim=64, max_length=run.tokens + 1
        )
        config.eos_token_id = 0
        baseline = LlamaForCausalLM(config)
    return tokcom.eval().to(device), baseline.eval().to(device)


def load_quality(run: RunArguments, source: TextSource, tokcom: Any) -> Quality | None:
    """Scorers of the timed rows; None unless both models are trained."""
    if run.model is None or run.baseline is None:
        return None
    data = load_source(source, tokcom.config.max_chunks * tokcom.config.vae.chunk_size, run.model)
    held_out, prefixes = full_rows(data.validation), None
    if run.num_prefixes:
        prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, run.prefix_length)
    train = np.asarray(data.train.token_ids, dtype=np.int64)
    return Quality(TextJudge(train, held_out, len(data.tokenizer) + 1), prefixes)


def measure(sampler: Contestant, rows: np.ndarray, quality: Quality, run: RunArguments) -> dict[str, float]:
    """Fluency and diversity of the timed rows, and BrierLM of their sampler where prefixes are given."""
    found = quality.judge.measure(rows)
    result = {key: found[key] for key in QUALITY}
    if quality.prefixes is not None:
        given, targets = quality.prefixes
        many = replace(sampler, batch_size=512)  # quality only; speed comes from the timed rows
        behind = tokens_behind_prefix(many, targets.shape[1])
        drawn, log_probs = many.scored_continuations(given, targets, run.draws, behind, seed=10_000)
        from_log_probs = None if log_probs is None else brier_scores_from_log_probs(log_probs[:, 1:], log_probs[:, 0])
        summary = brier_summary(brier_scores(drawn, targets) if from_log_probs is None else from_log_probs)
        result |= {key: summary[key] for key in ("brier_lm", "brier_lm_error")}
    return result


def alternate(
    contestants: dict[str, Contestant], batch: int, tokens: int, repeats: int
) -> dict[str, tuple[list[float], list[np.ndarray]]]:
    """Times each contestant in turn, `repeats` times, after one short run to warm up; seconds and rows of each."""
    timed: dict[str, tuple[list[float], list[np.ndarray]]] = {name: ([], []) for name in contestants}
    for sampler in contestants.values():
        sampler.rows(batch, min(tokens, 32), seed=0)
    for repeat in range(repeats):
        for name, sampler in contestants.items():
            synchronize()
            started = time.perf_counter()
            rows = sampler.rows(batch, tokens, seed=repeat)
            synchronize()
            timed[name][0].append(time.perf_counter() - started)
            timed[name][1].append(rows)
    return timed


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_recipe(main)
