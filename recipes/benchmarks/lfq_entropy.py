"""The entropy loss of lookup-free quantization: exact factorisation beside the dense table of 2^d probabilities.

    python recipes/benchmarks/lfq_entropy.py                       # 2048 tokens, 16 bits
    python recipes/benchmarks/lfq_entropy.py --tokens 4096 --output_dim 18 --variants factorised

Both compute the mean entropy of a token's code and the entropy of the mean code, and the gradient of their difference.
"dense" takes the softmax over all 2^d codes of −‖x − e‖², as implementations of LFQ commonly do. Each implementation runs in
separate processes, in turn (A B A B), so that its peak memory is measured alone; results are medians over steps and
processes. The values and gradients of both are then compared in float64 at 12 bits.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from variant_runs import run_variants

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.metrics.memory import high_water_mark
from tokcom_hf.models.shared_bit_entropy import factorised_entropy


@dataclass
class BenchmarkArguments:
    """Size of the step."""

    tokens: int = field(default=2048, metadata={"help": "Number of tokens."})
    output_dim: int = field(default=16, metadata={"help": "Bits per code."})
    steps: int = field(default=3, metadata={"help": "Timed steps per process, after one untimed step."})
    repeats: int = field(default=3, metadata={"help": "Processes per implementation."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's own choice."})
    variants: list = field(
        default_factory=lambda: ["dense", "factorised"], metadata={"help": "Implementations to run."}
    )
    variant: str | None = field(default=None, metadata={"help": "Run one implementation in this process (internal)."})
    output: str = field(default="outputs/benchmarks/lfq_entropy.json", metadata={"help": "Result file."})


def dense_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy and entropy of the mean from the whole `(n, 2^d)` table."""
    width = logits.shape[1]
    places = torch.arange(width, device=logits.device)
    signs = ((torch.arange(1 << width, device=logits.device)[:, None] >> places) & 1).to(logits.dtype) * 2 - 1
    # −‖x − e‖² = 2 x·e up to a constant of the row; bit i then has log odds 4 x_i = logits_i.
    log_p = (logits / 2 @ signs.t()).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    smallest = torch.finfo(mean.dtype).tiny
    return -(p * log_p).sum(1).mean(), -(mean * mean.clamp_min(smallest).log()).sum()


IMPLEMENTATIONS = {"dense": dense_entropy, "factorised": factorised_entropy}


def draw(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits `(tokens, width)` that require a gradient; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def one_variant(arguments: BenchmarkArguments) -> None:
    """Times forward and backward of one implementation; prints one line of JSON."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    entropies = IMPLEMENTATIONS[str(arguments.variant)]
    logits = draw(arguments.tokens, arguments.output_dim, torch.float32)
    # A small step first, so that what libraries allocate once is not counted.
    warm = draw(32, 4, torch.float32)
    per_sample, batch = entropies(warm)
    (per_sample - batch).backward()
    before = high_water_mark(restart=True)
    seconds = []
    for _ in range(arguments.steps + 1):
        logits.grad = None
        start = time.perf_counter()
        per_sample, batch = entropies(logits)
        (per_sample - batch).backward()
        seconds.append(time.perf_counter() - start)
    peak = high_water_mark()
    result = {
        "seconds": statistics.median(seconds[1:]),
        "step_bytes": peak - before,
        "peak_bytes": peak,
    }
    print(json.dumps({**result, "sample_entropy": per_sample.item(), "batch_entropy": batch.item()}))


def agreement(width: int = 12, tokens: int = 256) -> dict[str, float]:
    """Largest difference of values and gradients between both, in float64."""
    values = []
    for entropies in IMPLEMENTATIONS.values():
        logits = draw(tokens, width, torch.float64)
        per_sample, batch = entropies(logits)
        (per_sample - batch).backward()
        values.append((per_sample.detach(), batch.detach(), logits.grad))
    names = ("sample_entropy", "batch_entropy", "gradient")
    return {name: (a - b).abs().max().item() for name, a, b in zip(names, *values)}


def main() -> None:
    """Runs the variants in turn; prints and saves times, memory and agreement."""
    arguments = BenchmarkArguments(**parse_recipe(__doc__, {"benchmark": BenchmarkArguments})["benchmark"])
    if isinstance(arguments.variants, str):
        arguments.variants = [arguments.variants]
    unknown = set(arguments.variants) - set(IMPLEMENTATIONS)
    if unknown:
        raise RecipeError(f"Unknown variants {sorted(unknown)}; there are {', '.join(IMPLEMENTATIONS)}.")
    if arguments.variant:
        one_variant(arguments)
        return
    runs = run_variants(__file__, arguments.variants, arguments.repeats)
    table: dict[str, dict] = {}
    print(f"\n{arguments.tokens} tokens, {arguments.output_dim} bits, forward and backward")
    for variant, results in runs.items():
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        table[variant] = row
        print(f"{variant:>10}: {1000 * row['seconds']:9.1f} ms   memory of the step {row['step_bytes'] / 2**20:8.1f} MiB   "
              f"entropies {row['sample_entropy']:.6f} and {row['batch_entropy']:.6f} nats")  # fmt: skip
    report: dict = {"arguments": vars(arguments), "agreement_float64": agreement(), **table}
    if len(table) == 2:
        fast, dense = table["factorised"], table["dense"]
        report["speedup"] = dense["seconds"] / fast["seconds"]
        report["memory_share"] = fast["step_bytes"] / max(dense["step_bytes"], 1)
        print(f"factorised: {report['speedup']:.0f} x faster, {report['memory_share']:.4f} of the memory")
    worst = report["agreement_float64"]
    print(f"largest differences in float64, 12 bits: {max(worst['sample_entropy'], worst['batch_entropy']):.1e} nats, "
          f"gradient {worst['gradient']:.1e}")  # fmt: skip
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
