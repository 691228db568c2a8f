"""Memory and time of training 65,536 new vocabulary rows beside 32,000 frozen ones, four ways.

    python recipes/benchmarks/lfq_vocab.py
    python recipes/benchmarks/lfq_vocab.py --hidden_sizes 512 --tied false --repeats 9

`split`: LFQExpandedModel. `gradient_hook`: resize_token_embeddings and a hook that zeroes the gradient of old rows.
`peft`: PEFT TrainableTokens on the resized model. `decoupled`: the decoupled embedding and head of Idefics
(transformers). All four use the same frozen two-layer Llama and AdamW with weight decay; one step is forward, loss,
backward and optimizer. Steps are interleaved (A B C D A B C D) after one warm-up; times are medians, and the time ratio
is the median over rounds of split / best alternative. Peak memory is the growth of a new process's high-water mark from
the moment before the model is built.
Ids are half text, then half LFQ. Labels are set in two ways: `image`, as in the documented generation loss (only the
image's ids, which follow the caption), and `all`, a label at every position, where the matrix products common to all four
limit the gain. The losses of the first step are printed, because all four must compute the same function.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from peft import TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding, IdeficsDecoupledLinear

from tokcom_hf import LFQExpandedModel
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.metrics.memory import high_water_mark

SIDES = ("split", "gradient_hook", "peft", "decoupled")


@dataclass
class VocabArguments:
    """What to run."""

    hidden_sizes: list[int] | int = field(
        default_factory=lambda: [512, 1024], metadata={"help": "Widths of the Llama."}
    )
    old_rows: int = field(default=32000, metadata={"help": "Frozen vocabulary rows."})
    output_dim: int = field(default=16, metadata={"help": "Bits per code; 2^output_dim rows are new."})
    tokens: int = field(default=1024, metadata={"help": "Tokens per step."})
    tied: bool = field(default=True, metadata={"help": "Share one table between embedding and output head."})
    labels: list[str] | str = field(
        default_factory=lambda: ["image", "all"], metadata={"help": "Which ids are predicted: image, all."}
    )
    layers: int = field(default=2, metadata={"help": "Layers of the Llama."})
    repeats: int = field(default=5, metadata={"help": "Timed rounds."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    output_dir: str = field(default="outputs/benchmarks/lfq_vocab", metadata={"help": "Folder of results.json."})
    peak_of: str | None = field(
        default=None, metadata={"help": "Internal: side:hidden size:labels whose peak to print."}
    )


def base_model(args: VocabArguments, hidden_size: int) -> LlamaForCausalLM:
    """The frozen Llama whose vocabulary is extended; its weights are the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.old_rows,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=args.tied,
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


def new_rows(args: VocabArguments, hidden_size: int) -> torch.Tensor:
    """Values `(2^output_dim, hidden_size)` of the new rows, the same for all four ways and both tables."""
    generator = torch.Generator().manual_seed(1)
    return 0.02 * torch.randn(2**args.output_dim, hidden_size, generator=generator)


@torch.no_grad()
def build(side: str, args: VocabArguments, hidden_size: int) -> nn.Module:
    """One of the four models."""
    base, rows, start = base_model(args, hidden_size), new_rows(args, hidden_size), args.old_rows
    total = start + len(rows)
    if side == "split":
        model = LFQExpandedModel.from_base(base, output_dim=args.output_dim)
        model.lfq_rows.embedding.copy_(rows)
        if not args.tied:
            model.lfq_rows.head.copy_(rows)
        return model
    if side == "decoupled":
        body = base.model
        embedding = IdeficsDecoupledEmbedding(start, len(rows), hidden_size, partially_freeze=True)
        embedding.weight = nn.Parameter(body.embed_tokens.weight, requires_grad=False)
        embedding.additional_embedding.weight.copy_(rows)
        head = IdeficsDecoupledLinear(hidden_size, start, len(rows), bias=False, partially_freeze=True)
        head.weight = nn.Parameter(base.lm_head.weight, requires_grad=False)
        if args.tied:
            head.additional_fc.weight = embedding.additional_embedding.weight
        else:
            head.additional_fc.weight.copy_(rows)
        body.embed_tokens, base.lm_head = embedding, head
        base.vocab_size = base.config.vocab_size = total
        return base
    base.resize_token_embeddings(total, mean_resizing=False)
    tables = [base.model.embed_tokens.weight] + ([] if args.tied else [base.lm_head.weight])
    for table in tables:
        table[start:] = rows
    if side == "gradient_hook":
        for table in tables:
            table.requires_grad_(True)
            table.register_hook(lambda grad: grad.index_fill(0, torch.arange(start), 0.0))
        return base
    targets = ["embed_tokens"] + ([] if args.tied else ["lm_head"])
    config = TrainableTokensConfig(token_indices=list(range(start, total)), target_modules=targets)
    return get_peft_model(base, config).train()


def make_step(model: nn.Module, args: VocabArguments, labelled: str) -> Callable[[], float]:
    """One training step as a function that returns its loss."""
    generator = torch.Generator().manual_seed(2)
    half = args.tokens // 2
    text = torch.randint(args.old_rows, (1, half), generator=generator)
    image = args.old_rows + torch.randint(2**args.output_dim, (1, args.tokens - half), generator=generator)
    ids = torch.cat([text, image], dim=1)
    labels = ids if labelled == "all" else torch.cat([torch.full_like(text, -100), image], dim=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    # The default optimizer of transformers' Trainer.
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peak_bytes(side: str, args: VocabArguments, hidden_size: int, labelled: str) -> int:
    """Growth of the process's high-water mark over building the model and three training steps."""
    small = VocabArguments(old_rows=50, output_dim=4, tokens=8, layers=1, tied=args.tied)
    make_step(build(side, small, 32), small, labelled)()
    gc.collect()
    before = high_water_mark(restart=True)
    step = make_step(build(side, args, hidden_size), args, labelled)
    for _ in range(3):
        step()
    return high_water_mark() - before


def peak_in_fresh_process(side: str, args: VocabArguments, hidden_size: int, labelled: str) -> int:
    """`peak_bytes`, measured in a new process."""
    command = [sys.executable, __file__, "--peak_of", f"{side}:{hidden_size}:{labelled}"]
    for name in ("old_rows", "output_dim", "tokens", "tied", "layers", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def measure(args: VocabArguments, hidden_size: int, labelled: str) -> dict:
    """Times, peaks and ratios at one width and setting of labels."""
    peaks = {side: peak_in_fresh_process(side, args, hidden_size, labelled) for side in SIDES}
    steps = {side: make_step(build(side, args, hidden_size), args, labelled) for side in SIDES}
    losses = {side: step() for side, step in steps.items()}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side, step in steps.items():
            started = time.perf_counter()
            step()
            times[side].append(time.perf_counter() - started)
    others = SIDES[1:]
    best = min(others, key=lambda side: statistics.median(times[side]))
    return {
        "hidden_size": hidden_size,
        "labels": labelled,
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "peak_bytes": peaks,
        "first_loss": losses,
        "fastest_alternative": best,
        "time_ratio": statistics.median(a / b for a, b in zip(times["split"], times[best], strict=True)),
        "memory_ratio": peaks["split"] / min(peaks[side] for side in others),
    }


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs the benchmark and returns its rows."""
    args = VocabArguments(**parse_recipe(__doc__, {"run": VocabArguments}, None, argv)["run"])
    torch.set_num_threads(args.threads)
    if args.peak_of:
        side, width, labelled = args.peak_of.split(":")
        print(peak_bytes(side, args, int(width), labelled))
        return []
    rows = []
    sizes = [args.hidden_sizes] if isinstance(args.hidden_sizes, int) else args.hidden_sizes
    settings = [args.labels] if isinstance(args.labels, str) else args.labels
    for hidden_size, labelled in product(sizes, settings):
        row = measure(args, hidden_size, labelled)
        rows.append(row)
        print(
            f"\n{args.old_rows} + {2**args.output_dim} rows of {hidden_size}, {args.tokens} tokens, tied: {args.tied}"
        )
        print("| rows trained by | peak GB | ms per step | first loss |\n|---|---|---|---|")
        for side in SIDES:
            print(
                f"| {side} | {row['peak_bytes'][side] / 1e9:.2f} | {1000 * row['seconds'][side]:.0f} | "
                f"{row['first_loss'][side]:.4f} |"
            )
        print(
            f"split / best alternative: memory {row['memory_ratio']:.2f}, time {row['time_ratio']:.2f} "
            f"(against {row['fastest_alternative']})",
            flush=True,
        )
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(
        json.dumps({"arguments": vars(args), "rows": rows}, indent=2), encoding="utf-8"
    )
    return rows


if __name__ == "__main__":
    run_recipe(main)
