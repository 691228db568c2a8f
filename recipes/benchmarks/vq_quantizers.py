"""Compares quantizers in one run: same network, data, optimiser, steps and seeds (needs the extra `bench`).

    python recipes/benchmarks/vq_quantizers.py --codebook_sizes 64 1024 --seeds 3
    python recipes/benchmarks/vq_quantizers.py --image_dir photos --codebook_sizes 1024

Rows: vector-quantize-pytorch (a) default, (b) threshold_ema_dead_code=2, (c) codebook_dim 16 + cosine + threshold 2,
(d) k-means init; its FSQ; a naive straight-through codebook; this package's `ema`, `fsq`, `lfq` quantizers; and the
documented ("paper") settings with and without their remedies. 32 px images, 64 codes each, batch 32, AdamW; rows of one
seed share initial weights and the order of batches. Held-out utilisation, normalised entropy and PSNR over the whole
held-out set; mean and spread over seeds. Settings of this package were chosen with `--split tune`, whose images the
table never shows. Writes JSON after every run; the same command goes on where it was interrupted. `minutes` is training
time where the machine is otherwise idle.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.images import FolderImages, ProceduralImages, RandomCrops
from tokcom_hf.metrics.codebook import usage_of_counts
from tokcom_hf.metrics.image import psnr
from tokcom_hf.models.configuration_vqgan import VQGANConfig, default_fsq_levels
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.quantizers import EMAQuantizer, QuantizerOutput

NETWORK = {
    "image_size": 32,
    "downsample_factor": 4,
    "patch_size": 2,
    "base_channels": 32,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "mid_attention": False,
    "latent_channels": 64,
    "l1_weight": 1.0,
    "mse_weight": 1.0,
}
# Codes have log2 of the codebook size dimensions, but for those of `WIDE`.
OURS = {
    "codebook_similarity": "euclidean",
    "commitment_weight": 0.25,
    "entropy_weight": 0.0,
    "temperature": 0.0,
    "codebook_init": "kmeans",
    "ema_decay": 0.97,
    "dead_code_threshold": 0.4,
    "dead_code_unit": "mean",
    "reset_interval": 1,
}
# Up to this many codes are as wide as the features, without a map around the codebook, and every step sees each of them
# often enough to balance their use. Behind a map to 10 dimensions the network reproduces nothing but mean colours for
# longer: on tuning photos, K=1024, seeds 0 to 2, 23.9, 21.2 and 22.3 dB at an entropy of 0.982 with it, 24.0, 23.8 and
# 23.7 dB at 0.974 without, 24.0 and 23.8 dB (seeds 0, 1) at 0.982 balanced. On procedural tuning images (seed 0) 21.44 dB
# at 0.993 with the map, 21.32 dB at 0.987 without. An orthogonal map came to 21.1 dB on seed 1 of the photos, the
# rotation estimator to 22.3, and quantizing after 10 % or 50 % of the steps to 22.1 and 21.1. For K=64 (seed 0; photos,
# procedural): 22.2 dB at 0.981 and 20.06 at 0.989 narrow, 21.5 dB at 0.993 balanced, 23.1 dB at 0.992 and 19.96 at 0.998
# wide too, 23.2 dB at 0.992 and 20.01 at 0.998 with a shorter stretch without quantization on top. Without any such
# stretch one seed of three loses 1.5 dB on photos.
WIDE_CODES = 1024
WIDE = {"codebook_dim": NETWORK["latent_channels"], "balance_rate": 0.05}
# Share of the steps without quantization before `ours` places its codes by k-means.
WARMUP = 0.3
WARMUP_FEW_CODES = 0.15
FEW_CODES = 256
# Documented: the commitment grows over five epochs, codes are reset once an epoch. These runs last about one epoch, so
# codes are reset more often here. Not documented: how long codes are drawn at the temperature, what distances are divided
# by (√width instead of their mean costs 3 dB, because the entropy term then inflates the features), and the temperature
# of the entropy term (sharper assignments than 25 cost more).
PAPER = {"codebook_dim": 64, "temperature_scale": "mean", "entropy_temperature": 25.0}
PAPER_COMMITMENT_EPOCHS = 5
PAPER_RESET_INTERVAL = 30
PAPER_ANNEAL = 0.01
NO_REMEDIES = {"entropy_weight": 0.0, "temperature": 0.0, "reset_fraction": 0.0}


# What all rows of one table must share.
COMMON = ("steps", "batch_size", "learning_rate", "num_train", "num_eval", "image_dir", "scale", "split")


@dataclass
class BenchmarkArguments:
    """What to run."""

    codebook_sizes: list[int] = field(default_factory=lambda: [64, 1024])
    methods: list[str] | str | None = field(default=None, metadata={"help": "Rows to run; all where not given."})
    seeds: int = 3
    first_seed: int = 0
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3
    num_train: int = 8192
    num_eval: int = 1024
    image_dir: str | None = field(default=None, metadata={"help": "Folder of photos, cropped; procedural otherwise."})
    scale: float = field(default=0.5, metadata={"help": "Shrinking of photos before they are cropped."})
    split: str = field(
        default="held_out",
        metadata={"help": "held_out (to report), or tune (to choose settings); they share no image."},
    )
    output_dir: str = "outputs/benchmarks/vq_quantizers"


class Library(nn.Module):
    """A quantizer of vector-quantize-pytorch behind this package's interface."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer
        self.enabled, self.update_in_forward = True, True

    def forward(self, features: torch.Tensor) -> QuantizerOutput:
        shape = features.shape
        embeddings, codes, *loss = self.quantizer(features.reshape(shape[0], -1, shape[-1]))
        # The library's loss already holds its commitment weight of 1.
        loss = loss[0].sum() if loss else features.new_zeros(())
        return QuantizerOutput(
            embeddings=embeddings.reshape(shape),
            codes=codes.reshape(shape[:-1]).long(),
            commitment_loss=loss,
            entropy_loss=features.new_zeros(()),
        )


class Naive(nn.Module):
    """VQ-VAE's own codebook: U(±1/K), straight-through, codebook loss and 0.25 commitment, no remedy."""

    def __init__(self, width: int, codebook_size: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, width).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.enabled, self.update_in_forward = True, True

    def forward(self, features: torch.Tensor) -> QuantizerOutput:
        flat = features.reshape(-1, features.shape[-1])
        codes = torch.cdist(flat.detach(), self.codebook.detach()).argmin(1)
        chosen = self.codebook[codes]
        loss = F.mse_loss(chosen, flat.detach()) + 0.25 * F.mse_loss(flat, chosen.detach())
        return QuantizerOutput(
            embeddings=(flat + (chosen - flat).detach()).reshape(features.shape),
            codes=codes.reshape(features.shape[:-1]),
            commitment_loss=loss,
            entropy_loss=features.new_zeros(()),
        )


def build(method: str, size: int) -> VQGAN:
    """The common network with the quantizer of one row."""
    ours = {"codebook_dim": size.bit_length() - 1} | OURS | (WIDE if size <= WIDE_CODES else {})
    own = {"ours": ours, "ours_cosine": ours | {"codebook_similarity": "cosine"}, "paper": PAPER}
    own["ours_fsq"] = ours | {"quantizer": "fsq"}
    own["ours_lfq"] = ours | {"quantizer": "lfq", "entropy_weight": 0.3, "entropy_temperature": 0.3}
    own["ours_no_warmup"] = ours
    own["paper_no_remedies"] = PAPER | NO_REMEDIES
    if method in own:
        return VQGAN(VQGANConfig(**NETWORK, codebook_size=size, **own[method]))
    external = {"commitment_weight": 1.0, "entropy_weight": 0.0, "temperature": 0.0}
    model = VQGAN(VQGANConfig(**NETWORK, codebook_size=size, **external))
    width = NETWORK["latent_channels"]
    if method == "naive":
        model.quantizer = Naive(width, size)
        return model
    from vector_quantize_pytorch import FSQ, VectorQuantize

    extra = {
        "library_default": {},
        "library_threshold": {"threshold_ema_dead_code": 2},
        "library_cosine16": {"codebook_dim": 16, "use_cosine_sim": True, "threshold_ema_dead_code": 2},
        "library_kmeans": {"kmeans_init": True},
    }
    if method == "library_fsq":
        model.quantizer = Library(FSQ(levels=default_fsq_levels(size), dim=width))
    elif method in extra:
        model.quantizer = Library(VectorQuantize(dim=width, codebook_size=size, **extra[method]))
    else:
        raise ValueError(f"Unknown method {method!r}; choose from {', '.join(METHODS)}.")
    return model


METHODS = [
    "naive",
    "library_default",
    "library_threshold",
    "library_cosine16",
    "library_kmeans",
    "library_fsq",
    "ours",
    "ours_cosine",
    "ours_no_warmup",
    "ours_fsq",
    "ours_lfq",
    "paper_no_remedies",
    "paper",
]


def stack(images) -> torch.Tensor:
    """All images of a data set, `(n, 3, 32, 32)`."""
    return torch.stack([images[index]["pixel_values"] for index in range(len(images))])


def load_data(args: BenchmarkArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, and the images of `args.split`; training, tuning and held-out images are disjoint.

    Raises:
        ValueError: no such split, or too few photos to split three ways.
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
    """k-means on features of up to 1024 training images."""
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


def summary(rows: list[dict]) -> str:
    """Markdown table, mean ± half the range over seeds."""
    lines = ["| K | quantizer | seeds | utilisation % | normalised entropy | PSNR dB |", "|---|---|---|---|---|---|"]
    for size, method in dict.fromkeys((row["codebook_size"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["codebook_size"], row["method"]) == (size, method)]

        def cell(name: str, factor: float, digits: int, mine=mine) -> str:
            values = [factor * row[name] for row in mine]
            return f"{sum(values) / len(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"

        cells = [cell("utilization", 100, 1), cell("normalized_entropy", 1, 3), cell("psnr", 1, 2)]
        lines.append(f"| {size} | {method} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
                data = {"data": args.image_dir or "procedural", "arguments": vars(args), "rows": rows}
                (output / "results.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
                shown = {
                    name: round(value, 4) if isinstance(value, float) else value for name, value in rows[-1].items()
                }
                print(shown, flush=True)
    print(summary(rows))
    (output / "table.md").write_text(summary(rows) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    run_recipe(main)
