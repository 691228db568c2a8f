"""Time and memory of a quantizer's training step, against vector-quantize-pytorch (extra `bench`).

    python recipes/benchmarks/vq_speed.py

One step is forward with gradient, backward and codebook update. Both codebooks are Euclidean EMA without projections, on
the same float32 vectors, and revive dead codes (library: threshold 2). Runs are interleaved (A B A B); the ratio is a
median. Peak memory is measured in a new process per quantizer, as the growth of the process's high-water mark since
before the first step (CPU), or by the allocator (`--device cuda`).
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.metrics.memory import high_water_mark
from tokcom_hf.models.configuration_vqgan import VQGANConfig
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer

SHAPES = ((4096, 256, 64), (4096, 256, 8192), (16384, 64, 16384))
SIDES = ("ours", "library")


@dataclass
class SpeedArguments:
    """What to run."""

    repeats: int = field(default=9, metadata={"help": "Timed steps of each quantizer."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    output_dir: str = field(default="outputs/benchmarks/vq_speed", metadata={"help": "Folder of results.json."})
    peak_of: str | None = field(default=None, metadata={"help": "Internal: side:shape whose peak memory to print."})


def build(side: str, width: int, size: int) -> nn.Module:
    """The quantizer of one side."""
    if side == "ours":
        config = VQGANConfig(
            codebook_size=size,
            codebook_dim=width,
            temperature=0.0,
            entropy_weight=0.0,
            codebook_init="data",
            ema_decay=0.9,
            dead_code_threshold=0.2,
            dead_code_unit="mean",
            reset_interval=1,
        )
        return EMAQuantizer(config, width)
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=width, codebook_size=size, decay=0.9, threshold_ema_dead_code=2)


def step(quantizer: nn.Module, vectors: torch.Tensor) -> None:
    """One training step of the quantizer alone."""
    features = vectors.clone().requires_grad_()
    if isinstance(quantizer, EMAQuantizer):
        output = quantizer(features)
        loss = output.embeddings.square().mean() + output.commitment_loss
    else:
        embeddings, _, commitment = quantizer(features)
        loss = embeddings.square().mean() + commitment.sum()
    loss.backward()


def timed(quantizer: nn.Module, vectors: torch.Tensor) -> float:
    """Milliseconds of one step."""
    if vectors.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    step(quantizer, vectors)
    if vectors.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def data(shape: tuple[int, int, int], device: str) -> torch.Tensor:
    """Vectors `(1, n, d)` in clusters, like the features of a trained encoder."""
    number, width, _ = shape
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(256, width, generator=generator)
    rows = centres[torch.randint(256, (number,), generator=generator)]
    return (rows + 0.5 * torch.randn(number, width, generator=generator))[None].to(device)


def peak_megabytes(side: str, shape: tuple[int, int, int], device: str) -> float:
    """Growth of peak memory during three steps, in MB."""
    vectors = data(shape, device)
    quantizer = build(side, *shape[1:]).to(device).train()
    # A small step first, so that loading kernels is not counted.
    small = build(side, 8, 16).to(device).train()
    step(small, torch.randn(1, 64, 8, device=device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        before = high_water_mark(restart=True)
    for _ in range(3):
        step(quantizer, vectors)
    after = float(torch.cuda.max_memory_allocated()) if device == "cuda" else high_water_mark()
    return (after - before) / 1e6


def peak_in_fresh_process(side: str, index: int, args: SpeedArguments) -> float:
    """`peak_megabytes`, measured in a new process."""
    command = [sys.executable, __file__, "--peak_of", f"{side}:{index}", "--device", args.device]
    done = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs the benchmark and returns its rows."""
    args = SpeedArguments(**parse_recipe(__doc__, {"run": SpeedArguments}, None, argv)["run"])
    torch.set_num_threads(args.threads)
    if args.peak_of:
        side, index = args.peak_of.split(":")
        print(peak_megabytes(side, SHAPES[int(index)], args.device))
        return []
    rows = []
    print("| vectors × width, K | ours ms | library ms | faster (median ratio) | ours MB | library MB |")
    print("|---|---|---|---|---|---|", flush=True)
    for index, shape in enumerate(SHAPES):
        vectors = data(shape, args.device)
        sides = {side: build(side, *shape[1:]).to(args.device).train() for side in SIDES}
        for quantizer in sides.values():
            step(quantizer, vectors)
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side, quantizer in sides.items():
                times[side].append(timed(quantizer, vectors))
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["library"], strict=True))
        medians = {side: statistics.median(values) for side, values in times.items()}
        peaks = {side: peak_in_fresh_process(side, index, args) for side in SIDES}
        rows.append({"shape": shape, "milliseconds": medians, "ratio": ratio, "peak_megabytes": peaks})
        print(
            f"| {shape[0]} × {shape[1]}, {shape[2]} | {medians['ours']:.1f} | {medians['library']:.1f} | {ratio:.2f} | "
            f"{peaks['ours']:.0f} | {peaks['library']:.0f} |",
            flush=True,
        )
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"threads": args.threads, "device": args.device, "rows": rows}, indent=2)
    (output / "results.json").write_text(text, encoding="utf-8")
    return rows


if __name__ == "__main__":
    run_recipe(main)
