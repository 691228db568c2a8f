"""TokCom on one GPU in at most six minutes: throughput at three sizes, and quality after three minutes of training.

    python recipes/benchmarks/tokcom_gpu.py                            # text that every Python carries
    python recipes/benchmarks/tokcom_gpu.py --text_file train.txt

Needs one GPU of 80 GB for the largest size; without a GPU it says so and ends. Measures tokens per second in bfloat16, of a
training step of either stage and of generation (blocks of 1, 4, 16 and all chunks; 1, 4 and 8 steps), beside a Llama with KV
cache and as many parameters, at 12 M and 110 M parameters and at the documented size (`paper`, whose rows are one block).
Then trains the 110 M model for three minutes on the text and measures it on the held-out part. Prints rows, writes JSON.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_throughput import LENGTH, SIZES, build, throughput
from torch import nn

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text import TextRows, load_text_rows
from tokcom_hf.data.text_evaluation import full_rows
from tokcom_hf.evaluation.text_generation import HeadSampler, Sampler, TokComSampler
from tokcom_hf.evaluation.text_likelihood import head_losses
from tokcom_hf.evaluation.text_protocol import SamplingPlan, held_out_prefixes, measure_sampler, summarize
from tokcom_hf.evaluation.text_report import print_row
from tokcom_hf.metrics.text import TextJudge
from tokcom_hf.trainers.muon import MuonWithAdamW, split_for_muon
from tokcom_hf.trainers.tokcom import draw_blocks

# Seconds reserved at the end for evaluating the trained model and writing; throughput rows must end before them.
MEASURING_SECONDS = 50.0


@dataclass
class RunArguments:
    """What is measured, and for how long."""

    text_file: str | None = field(
        default=None, metadata={"help": "Text; none takes the text that every Python carries."}
    )
    output: str = field(default="outputs/benchmarks/tokcom_gpu.json", metadata={"help": "Result file."})
    sizes: list[str] = field(
        default_factory=lambda: ["12M", "110M", "paper"], metadata={"help": "Sizes whose throughput is measured."}
    )
    train_size: str = field(default="110M", metadata={"help": "Size that is trained."})
    train_seconds: float = field(default=180.0, metadata={"help": "Seconds of training, both stages together."})
    least_steps: int = field(default=2, metadata={"help": "Fewest steps of each stage, even when time is over."})
    time_limit: float = field(
        default=350.0, metadata={"help": "Seconds of the whole run; rows that do not fit are left out."}
    )
    step_tokens: int = field(default=16384, metadata={"help": "Tokens of a training step; a quarter of it for paper."})
    timed_steps: int = field(default=5, metadata={"help": "Timed training steps, after two untimed ones."})
    tokens: int = field(default=256, metadata={"help": "Tokens per generated row."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Rows generated together."})
    block_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16, 0], metadata={"help": "Chunks per block; 0 for all."}
    )
    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8], metadata={"help": "Flow steps per block."})
    vocab_size: int = field(default=4096, metadata={"help": "Size of the tokenizer trained on the text."})
    num_samples: int = field(default=64, metadata={"help": "Rows of the quality table."})
    num_prefixes: int = field(default=1000, metadata={"help": "Number of prefixes for BrierLM."})
    device: str = field(default="cuda", metadata={"help": "cuda; cpu runs the same code, for tests."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and batches."})


def main() -> None:
    """Measures throughput and quality within --time_limit; prints and saves both."""
    run = RunArguments(**parse_recipe(__doc__, {"run": RunArguments})["run"])
    for name in ("sizes", "batch_sizes", "block_sizes", "num_steps"):
        value = getattr(run, name)
        setattr(run, name, value if isinstance(value, list) else [value])
    unknown = [name for name in [*run.sizes, run.train_size] if name not in SIZES]
    if unknown:
        raise RecipeError(f"No size {', '.join(unknown)}; there are {', '.join(SIZES)}.")
    if SIZES[run.train_size] == {}:
        raise RecipeError("--train_size paper is the documented recipe: train it with recipes/train_tokcom.py.")
    if run.device == "cuda" and not torch.cuda.is_available():
        print("No GPU on this machine: nothing was measured.")
        return
    started = time.perf_counter()
    seconds_left = lambda: run.time_limit - (time.perf_counter() - started)  # noqa: E731
    torch.manual_seed(run.seed)
    card = torch.cuda.get_device_name() if run.device == "cuda" else "cpu"
    print(f"{card}; torch {torch.__version__}", flush=True)
    data = load_text_rows(train_file=run.text_file, vocab_size=run.vocab_size, length=LENGTH)
    result: dict[str, Any] = {"settings": vars(run), "device": card, "throughput": {}, "left_out": []}
    for size in run.sizes:
        result["throughput"][size] = throughput(
            size, len(data.tokenizer) + 1, run, result["left_out"],
            lambda: seconds_left() - run.train_seconds - MEASURING_SECONDS,
        )  # fmt: skip
    seconds = max(0.0, min(run.train_seconds, seconds_left() - MEASURING_SECONDS))
    result["training"] = train_and_measure(data, seconds, run)
    result["seconds"] = time.perf_counter() - started
    path = Path(run.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")
    if result["left_out"]:
        print(f"left out for lack of time: {', '.join(result['left_out'])}")
    print(f"{result['seconds']:.0f} s; results in {path}")


def train_and_measure(data: TextRows, seconds: float, run: RunArguments) -> dict[str, Any]:
    """Trains both stages of `run.train_size`, the VAE for a quarter of `seconds`; then measures model and controls."""
    model = build(run.train_size, len(data.tokenizer) + 1, run.device)
    print(f"\ntraining {run.train_size} ({model.num_parameters():,} parameters) for {seconds:.0f} s", flush=True)
    tokens = torch.from_numpy(np.asarray(data.train.token_ids, dtype=np.int64)).to(run.device)
    if len(tokens) <= LENGTH:
        raise RecipeError(f"The training text has {len(tokens)} tokens, but one row takes {LENGTH}; give more text.")
    generator = torch.Generator().manual_seed(run.seed)

    def flow_loss(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, **draw_blocks(model.config, ids.shape[1], generator)).loss

    found = {"vae": train(model.vae, lambda ids: model.vae(ids, labels=ids).loss, tokens, seconds / 4, run)}
    model.vae.eval().requires_grad_(False)
    with torch.no_grad():
        chunks = tokens[: min(len(tokens), 2**18) // 4 * 4].view(-1, 4)
        latents = model.encode(chunks).float().flatten(0, 1)
    model.fit_latents(latents.mean(dim=0), latents.std(dim=0))
    model.posterior.fit(model, chunks)
    found["denoiser"] = train(model, flow_loss, tokens, 3 * seconds / 4, run)
    model.eval()

    held_out, train_ids = full_rows(data.validation), np.asarray(data.train.token_ids, dtype=np.int64)
    judge = TextJudge(train_ids, held_out, len(data.tokenizer) + 1)
    ids = torch.from_numpy(held_out[:64]).to(run.device)
    found["token_accuracy"] = float((model.reconstruct(ids) == ids).float().mean())
    found["head_nats"] = head_losses(model, held_out)
    print(f"held-out token accuracy of the VAE {found['token_accuracy']:.4f}; nats per token of the heads "
          + " ".join(f"{nats:.3f}" for nats in found["head_nats"]))  # fmt: skip
    prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, 64)
    found["rows"] = {"held-out text": summarize([judge.measure(judge.held_out_rows[: run.num_samples])])}
    print_row("held-out text", found["rows"]["held-out text"], header=True)
    samplers: dict[str, Sampler] = {
        "heads alone": HeadSampler(model, batch_size=512),
        "TokCom, noise removed": TokComSampler(model, {"temperature": 0.0}, batch_size=512),
        **{f"TokCom, block {block}": TokComSampler(model, {"block_size": block}, batch_size=512) for block in (1, 16)},
    }  # fmt: skip
    for name, sampler in samplers.items():
        row = measure_sampler(sampler, judge, [0], SamplingPlan(run.num_samples, LENGTH, prefixes, 8))
        found["rows"][name] = row
        print_row(name, row)
    found["sample"] = data.tokenizer.decode(samplers["TokCom, block 1"].rows(1, LENGTH, 0)[0])
    print(found["sample"][:600])
    return found


def train(
    model: nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    seconds: float,
    run: RunArguments,
) -> dict[str, float]:
    """Trains `model` on windows of the text for `seconds` and at least `least_steps`; keeps the averaged weights.

    The learning rate follows the clock: a short warm-up, then a cosine to 0.
    """
    matrices, others = split_for_muon(model)
    optimizer = MuonWithAdamW(matrices, others, 0.01, 2e-3, weight_decay=0.05)
    rates = [group["lr"] for group in optimizer.param_groups]
    weights = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    rows, generator = max(1, run.step_tokens // LENGTH), torch.Generator().manual_seed(run.seed)
    model.train()
    losses: list[torch.Tensor] = []
    started, step = time.perf_counter(), 0
    while (done := min((time.perf_counter() - started) / max(seconds, 1e-6), step / run.least_steps)) < 1:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        starts = torch.randint(len(tokens) - LENGTH, (rows, 1), generator=generator).to(tokens.device)
        with torch.autocast(run.device, torch.bfloat16):
            value = loss(tokens[starts + torch.arange(LENGTH, device=tokens.device)])
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(0.995, (1 + step) / (10 + step)))
        step += 1
        losses.append(value.detach())
        if step % 50 == 0:  # rarely, because reading the loss waits for the GPU
            print(f"  step {step}: loss {value.item():.4f}", flush=True)
    for parameter, mean in zip(weights, average):
        parameter.data.copy_(mean)
    curve = torch.stack(losses).float().tolist()
    first, last = float(np.mean(curve[:2])), float(np.mean(curve[-max(2, step // 20) :]))
    elapsed, count = time.perf_counter() - started, step * rows * LENGTH
    print(f"  {step} steps, {count / elapsed:,.0f} tokens/s: loss {first:.3f} -> {last:.3f}", flush=True)
    return {"steps": step, "tokens": count, "seconds": elapsed, "tokens_per_second": count / elapsed,
            "first_loss": first, "last_loss": last}  # fmt: skip


if __name__ == "__main__":
    run_recipe(main)
