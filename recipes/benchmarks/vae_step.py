"""One training step of the VAE beside a plain implementation: tokens per second and peak memory.

    python recipes/benchmarks/vae_step.py                 # 8 layers, hidden 512, vocabulary 32k, batch 8 × 1024 tokens

All run the same blocks on the same weights. "plain" is the straightforward way: it loops over the chunks of a row, decodes
each alone, stacks all logits and takes `torch.nn.functional.cross_entropy` of them. "folded" is `TokComVAE`: the chunks are
the batch, and the loss never holds all logits at once. "row by row" is "folded" with gradients accumulated over the rows
(`--gradient_accumulation_steps`): chunks are independent, so it computes the same gradient with the activations of one row.
Each runs in separate processes, in turn; results are medians of the steps after the first.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from variant_runs import run_variants

from tokcom_hf import TokComVAE, TokComVAEConfig
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.metrics.memory import high_water_mark


@dataclass
class BenchmarkArguments:
    """Size of the step."""

    layers: int = field(default=8, metadata={"help": "Layers of the encoder and of the decoder."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the hidden states."})
    vocab_size: int = field(default=32000, metadata={"help": "Tokens of the vocabulary."})
    batch: int = field(default=8, metadata={"help": "Rows per step."})
    length: int = field(default=1024, metadata={"help": "Tokens per row."})
    steps: int = field(default=2, metadata={"help": "Timed steps per process, after one untimed step."})
    repeats: int = field(default=2, metadata={"help": "Processes per implementation."})
    variant: str | None = field(default=None, metadata={"help": "Run one implementation in this process (internal)."})
    output: str = field(default="outputs/benchmarks/vae_step.json", metadata={"help": "Result file."})


def plain_loss(vae: TokComVAE, ids: torch.Tensor) -> torch.Tensor:
    """The same computation without folding: chunk by chunk, all logits at once."""
    size = vae.config.chunk_size
    logits = []
    for start in range(0, ids.shape[1], size):
        latents, _ = vae.posterior(ids[:, start : start + size])
        logits.append(vae.lm_head(vae.decode_hidden(latents)))
    return nn.functional.cross_entropy(torch.cat(logits, dim=1).flatten(0, 1).float(), ids.flatten())


def one_variant(arguments: BenchmarkArguments) -> None:
    """Times one implementation; prints one line of JSON."""
    torch.manual_seed(0)
    config = TokComVAEConfig(
        vocab_size=arguments.vocab_size, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers,
        num_attention_heads=8, num_key_value_heads=2, intermediate_size=arguments.hidden_size * 3,
    )  # fmt: skip
    vae = TokComVAE(config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)
    ids = torch.randint(arguments.vocab_size - 1, (arguments.batch, arguments.length))
    optimizer.zero_grad()
    before = high_water_mark(restart=True)
    seconds = []
    parts = ids.split(1) if arguments.variant == "row by row" else [ids]
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        total = 0.0
        for part in parts:
            loss = plain_loss(vae, part) if arguments.variant == "plain" else vae(part, labels=part).loss
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = high_water_mark()
    # The first step also allocates the optimizer state.
    result = {
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak,
        "step_bytes": peak - before,
    }
    print(json.dumps({**result, "loss": total}))


def main() -> None:
    """Runs the implementations in turn; prints and saves speed and memory."""
    arguments = BenchmarkArguments(**parse_recipe(__doc__, {"benchmark": BenchmarkArguments})["benchmark"])
    if arguments.variant:
        one_variant(arguments)
        return
    runs = run_variants(__file__, ("plain", "folded", "row by row"), arguments.repeats)
    tokens = arguments.batch * arguments.length
    table = {}
    for variant, results in runs.items():
        seconds = statistics.median(result["seconds"] for result in results)
        peak = statistics.median(result["peak_bytes"] for result in results)
        step = statistics.median(result["step_bytes"] for result in results)
        table[variant] = {"tokens_per_second": tokens / seconds, "peak_gib": peak / 2**30, "step_gib": step / 2**30}
        print(f"{variant:>10}: {tokens / seconds:8.0f} tokens/s   peak {peak / 2**30:5.2f} GiB "
              f"(of which the step {step / 2**30:5.2f} GiB)")  # fmt: skip
    for variant in ("folded", "row by row"):
        row, plain = table[variant], table["plain"]
        row["speed_ratio"] = row["tokens_per_second"] / plain["tokens_per_second"]
        row["memory_ratio"] = row["peak_gib"] / plain["peak_gib"]
        print(f"{variant} / plain: speed x {row['speed_ratio']:.2f}, peak memory x {row['memory_ratio']:.2f}")
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arguments": vars(arguments), **table}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
