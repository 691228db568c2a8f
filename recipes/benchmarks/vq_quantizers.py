"""Compares quantizers in one run: same network, data, optimiser, steps and seeds (needs the extra `bench`).

    python recipes/benchmarks/vq_quantizers.py --codebook_sizes 64 1024 --seeds 3
    python recipes/benchmarks/vq_quantizers.py --image_dir photos --codebook_sizes 1024

Rows: vector-quantize-pytorch (a) default, (b) threshold_ema_dead_code=2, (c) codebook_dim 16 + cosine + threshold 2,
(d) k-means init; its FSQ; a naive straight-through codebook; this package's `ema`, `fsq`, `lfq` quantizers; and the
documented ("paper") settings with and without their remedies. 32 px images, 64 codes each, batch 32, AdamW; rows of one
seed share initial weights and the order of batches. Held-out utilisation, normalised entropy and PSNR over the whole
held-out set; mean ± half the range over seeds. Settings of this package were chosen with `--split tune`, which shares no
image with the held-out set. Writes JSON after every run; the same command continues an interrupted benchmark. `minutes` is
wall-clock training time, which means something only on an otherwise idle machine.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from vq_rows import (
    FEW_CODES,
    METHODS,
    NETWORK,
    PAPER_ANNEAL,
    PAPER_COMMITMENT_EPOCHS,
    PAPER_RESET_INTERVAL,
    WARMUP,
    WARMUP_FEW_CODES,
    build,
)

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.images import FolderImages, ProceduralImages, RandomCrops
from tokcom_hf.metrics.codebook import usage_of_counts
from tokcom_hf.metrics.image import psnr
from tokcom_hf.models.configuration_vqgan import VQGANConfig
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer

# What all rows of one table must share.
COMMON = ("steps", "batch_size", "learning_rate", "num_train", "num_eval", "image_dir", "scale", "split")


@dataclass
class BenchmarkArguments:
    """What to run."""

    codebook_sizes: list[int] = field(default_factory=lambda: [64, 1024], metadata={"help": "Numbers of codes."})
    methods: list[str] | str | None = field(default=None, metadata={"help": "Rows to run; all where not given."})
    seeds: int = field(default=3, metadata={"help": "Number of training seeds."})
    first_seed: int = field(default=0, metadata={"help": "The first of these seeds."})
    steps: int = field(default=400, metadata={"help": "Training steps of each row."})
    batch_size: int = field(default=32, metadata={"help": "Images per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of AdamW."})
    num_train: int = field(default=8192, metadata={"help": "Training images, at most."})
    num_eval: int = field(default=1024, metadata={"help": "Procedural images of the split."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of photos, cropped; procedural otherwise."})
    scale: float = field(default=0.5, metadata={"help": "Factor by which photos are shrunk before cropping."})
    split: str = field(
        default="held_out",
        metadata={"help": "held_out (to report), or tune (to choose settings); they share no image."},
    )
    output_dir: str = field(default="outputs/benchmarks/vq_quantizers", metadata={"help": "Folder of results."})


def stack(images) -> torch.Tensor:
    """All images of a data set, `(n, 3, 32, 32)`."""
    return torch.stack([images[index]["pixel_values"] for index in range(len(images))])


def load_data(args: BenchmarkArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, and the images of `args.split`; training, tuning and held-out images are disjoint.

    Raises:
        ValueError: `split` is unknown, or there are too few photos to split three ways.
    """
    if args.split not in ("held_out", "tune"):
        raise ValueError(f"split must be held_out or tune, got {args.split!r}.")
    processor = VQGANImageProcessor(32, size_divisor=4)
    if args.image_dir is None:
        first = {"held_out": 20_000_000, "tune": 10_000_000}[args.split]
        held_out = ProceduralImages(args.num_eval, processor, first=first)
        return stack(ProceduralImages(args.num_train, processor)), stack(held_out)
    number = len(FolderImages(args.image_dir, processor).files)
    fold = min(20, number // 5)
    if fold == 0:
        raise ValueError(f"At least 5 photos are needed in {args.image_dir!r}, got {number}.")
    part = {"held_out": slice(fold), "tune": slice(fold, 2 * fold)}[args.split]
    train = RandomCrops(args.image_dir, processor, 64, args.scale, slice(2 * fold, None))
    return stack(train)[: args.num_train], stack(RandomCrops(args.image_dir, processor, 64, args.scale, part))


def train_one(method: str, size: int, seed: int, args: BenchmarkArguments, train: torch.Tensor) -> tuple[VQGAN, float]:
    """Trains one row with one seed; returns the model and its minutes."""
    torch.manual_seed(seed)
    network = VQGAN(VQGANConfig(**NETWORK))
    model = build(method, size).train()
    # Rows of one seed start from the same encoder and decoder and see the same batches.
    model.encoder.load_state_dict(network.encoder.state_dict())
    model.decoder.load_state_dict(network.decoder.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(1000 + seed)
    own = isinstance(model.quantizer, EMAQuantizer)
    share = WARMUP_FEW_CODES if size <= FEW_CODES else WARMUP
    warmup = int(share * args.steps) if own and method in ("ours", "ours_cosine") else 0
    started = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 20, (args.steps - step) / (0.3 * args.steps))
        batch = train[torch.randint(len(train), (args.batch_size,), generator=order)]
        model.quantizer.enabled = step >= warmup
        model.quantizer.update_in_forward = False
        if own:
            model.quantizer.temperature = model.config.temperature * max(0.0, 1 - step / (PAPER_ANNEAL * args.steps))
            if step == warmup and not model.quantizer.initialized:
                place_codebook(model, train, seed)
        if method.startswith("paper"):
            model.commitment_scale = min(1.0, step * args.batch_size / len(train) / PAPER_COMMITMENT_EPOCHS)
        optimizer.zero_grad()
        model(batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if hasattr(model.quantizer, "update"):
            interval = 1 if method.startswith("ours") else PAPER_RESET_INTERVAL
            model.quantizer.update(allow_reset=(step + 1) % interval == 0 and step < 0.85 * args.steps)
    return model.eval(), (time.perf_counter() - started) / 60


@torch.no_grad()
def place_codebook(model: VQGAN, train: torch.Tensor, seed: int) -> None:
    """Initialises the codebook by k-means on features of up to 1024 training images."""
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:1024]
    quantizer = model.quantizer
    parts = [quantizer.project_in(model.features(train[part])) for part in chosen.split(128)]
    quantizer.initialize(quantizer.prepare(torch.cat(parts).reshape(-1, quantizer.width)))


@torch.no_grad()
def measure(model: VQGAN, held_out: torch.Tensor, size: int) -> dict[str, float]:
    """Utilisation, normalised entropy and PSNR over all held-out images."""
    counts, quality = torch.zeros(size, dtype=torch.long), []
    for batch in held_out.split(128):
        output = model(batch)
        counts += torch.bincount(output.codes.flatten(), minlength=size)
        quality.append(psnr(output.reconstruction.clamp(-1, 1), batch))
    usage = usage_of_counts(counts)
    return {name: usage[name] for name in ("utilization", "normalized_entropy")} | {
        "psnr": float(torch.cat(quality).mean())
    }


def summarize(rows: list[dict]) -> list[dict]:
    """One line per size and quantizer: mean and half the range over seeds of each measure."""
    lines = []
    for size, method in dict.fromkeys((row["codebook_size"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["codebook_size"], row["method"]) == (size, method)]
        line: dict = {"codebook_size": size, "method": method, "seeds": len(mine)}
        for name in ("utilization", "normalized_entropy", "psnr"):
            values = [row[name] for row in mine]
            line[name] = {"mean": sum(values) / len(values), "half_range": (max(values) - min(values)) / 2}
        lines.append(line)
    return lines


def as_markdown(summary: list[dict]) -> str:
    """The lines of `summarize` as a Markdown table."""
    text = ["| K | quantizer | seeds | utilisation % | normalised entropy | PSNR dB |", "|---|---|---|---|---|---|"]
    for line in summary:
        cells = [
            f"{factor * line[name]['mean']:.{digits}f} ± {factor * line[name]['half_range']:.{digits}f}"
            for name, factor, digits in (("utilization", 100, 1), ("normalized_entropy", 1, 3), ("psnr", 1, 2))
        ]
        text.append(f"| {line['codebook_size']} | {line['method']} | {line['seeds']} | {' | '.join(cells)} |")
    return "\n".join(text)


def earlier_rows(output: Path, args: BenchmarkArguments) -> list[dict]:
    """Rows of an interrupted run in the same folder, which are not trained again.

    Raises:
        FileExistsError: the folder holds a run with other data or another budget.
    """
    path = output / "results.json"
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name in COMMON:
        if earlier["arguments"][name] != getattr(args, name):
            raise FileExistsError(
                f"{path} holds a run with {name} {earlier['arguments'][name]!r}, not {getattr(args, name)!r}; rows of "
                "one table must share it. Name another --output_dir."
            )
    return earlier["rows"]


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs the benchmark and returns its rows."""
    args = BenchmarkArguments(**parse_recipe(__doc__, {"run": BenchmarkArguments}, None, argv)["run"])
    sizes = args.codebook_sizes if isinstance(args.codebook_sizes, list) else [args.codebook_sizes]
    methods = args.methods or METHODS
    methods = [methods] if isinstance(methods, str) else methods
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = load_data(args)
    print(f"{len(train)} training and {len(held_out)} held-out images, {torch.get_num_threads()} threads", flush=True)
    rows = earlier_rows(output, args)
    done = {(row["codebook_size"], row["method"], row["seed"]) for row in rows}
    for size in sizes:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in methods:
                if (size, method, seed) in done:
                    continue
                model, minutes = train_one(method, size, seed, args, train)
                row = {"codebook_size": size, "method": method, "seed": seed, "steps": args.steps, "minutes": minutes}
                rows.append(row | measure(model, held_out, size))
                data = {
                    "data": args.image_dir or "procedural",
                    "arguments": vars(args),
                    "summary": summarize(rows),
                    "rows": rows,
                }
                (output / "results.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
                shown = {
                    name: round(value, 4) if isinstance(value, float) else value for name, value in rows[-1].items()
                }
                print(shown, flush=True)
    table = as_markdown(summarize(rows))
    print(table)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    run_recipe(main)
