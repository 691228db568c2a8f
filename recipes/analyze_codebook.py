"""Shows how a trained VQGAN uses its codebook.

    python recipes/analyze_codebook.py --model_path outputs/train_vqgan --plot --save_details
    python recipes/analyze_codebook.py --model_path outputs/train_vqgan --data_dir photos --image_size 128
    python recipes/analyze_codebook.py --model_path outputs/train_vqgan --interactive

`--model_path models/NAME.pt` reads the folder models/NAME that `train_vqgan.py --model_dir models --model_name NAME` wrote.

Prints utilisation, entropy and the most and least used codes, and writes `summary.json`. `--plot` adds the histogram and
usage curve `usage.png`, a picture of each code in `codes.png`, and `reconstructions.png`. `--save_details` adds `codes.csv`:
count, share, rank, norm and nearest other code of every code. `--temperature T` also reports the usage of codes sampled
from softmax(−distance / T).
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.images import FIRST_HELD_OUT, FolderImages, ProceduralImages
from tokcom_hf.metrics.codebook import usage_of_counts, utilization_ceiling
from tokcom_hf.metrics.image import psnr, ssim
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor, as_grid
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer
from tokcom_hf.plots.vqgan import NO_MATPLOTLIB, plot_usage
from tokcom_hf.trainers.vqgan_pictures import reconstruction_grid

COLUMNS = ("code", "count", "share", "rank", "norm", "nearest_code", "nearest_distance")


@dataclass
class AnalysisArguments:
    """What to analyse."""

    model_path: str = field(default="outputs/train_vqgan", metadata={"help": "VQGAN folder or Hub id."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of images; if not set, procedural images."})
    output_dir: str = field(
        default="outputs/analyze_codebook", metadata={"help": "Folder of summary, tables, figures."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels per side; if not set, the model's own."})
    batch_size: int = field(default=32, metadata={"help": "Images per forward pass."})
    num_images: int = field(default=512, metadata={"help": "Number of images, at most."})
    plot: bool = field(default=False, metadata={"help": "Draw PNG figures."})
    save_details: bool = field(default=False, metadata={"help": "Write codes.csv."})
    temperature: float = field(default=0.0, metadata={"help": "Also report sampling at this temperature (ema only)."})
    device: str | None = field(
        default=None,
        metadata={"help": "cpu, cuda or another torch device; if not set, the accelerator if there is one."},
    )
    interactive: bool = field(default=False, metadata={"help": "Browse the per-code table in the terminal."})


@torch.no_grad()
def collect(model, images, args: AnalysisArguments) -> dict:
    """Code counts, mean (PSNR in dB, SSIM) and the first pictures, over all images."""
    size = model.config.codebook_size
    counts, sampled = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    quality: list[torch.Tensor] = []
    pictures = None
    for start in tqdm(range(0, len(images), args.batch_size), desc="images", mininterval=1.0):
        rows = [images[index] for index in range(start, min(len(images), start + args.batch_size))]
        inputs = {name: torch.stack([row[name] for row in rows]).to(model.device) for name in rows[0]}
        pixels, target = inputs["pixel_values"], inputs.get("labels", inputs["pixel_values"])
        output = model(**inputs)
        image = output.reconstruction.clamp(-1, 1)
        counts += torch.bincount(output.codes.flatten(), minlength=size).cpu()
        quality.append(torch.stack([psnr(image, target), ssim(image, target)], dim=1).cpu())
        pictures = pictures or (target[:16].cpu(), image[:16].cpu())
        if args.temperature > 0:
            quantizer = model.quantizer
            features = model.features(pixels).float()
            vectors = quantizer.prepare(quantizer.project_in(features).reshape(-1, quantizer.width))
            quantizer.temperature = args.temperature
            sampled += torch.bincount(quantizer.sample_codes(vectors), minlength=size).cpu()
    return {"counts": counts, "sampled": sampled, "quality": torch.cat(quality).mean(0), "pictures": pictures}


def code_table(model, counts: torch.Tensor) -> list[dict]:
    """One row per code, in order of the codes."""
    size = len(counts)
    vectors = model.quantizer.vectors_of(torch.arange(size, device=model.device)).float().cpu()
    ranks = counts.argsort(descending=True, stable=True).argsort()
    rows = []
    for part in torch.arange(size).split(512):
        distance = torch.cdist(vectors[part], vectors)
        distance[torch.arange(len(part)), part] = float("inf")
        nearest = distance.min(1)
        for position, code in enumerate(part.tolist()):
            values = (
                code,
                int(counts[code]),
                float(counts[code]) / max(1, int(counts.sum())),
                int(ranks[code]) + 1,
                float(vectors[code].norm()),
                int(nearest.indices[position]),
                float(nearest.values[position]),
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def show(rows: list[dict]) -> str:
    """Rows as an aligned text table."""
    lines = ["  ".join(f"{name:>16}" for name in COLUMNS)]
    for row in rows:
        cells = (f"{row[name]:.5f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS)
        lines.append("  ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def browse(rows: list[dict], page: int = 20) -> None:
    """Terminal table: sort by a column, turn pages, look up a code."""
    order, start = sorted(rows, key=lambda row: -row["count"]), 0
    while True:
        print(show(order[start : start + page]))
        print(
            f"[{start + 1}–{min(start + page, len(order))} of {len(order)}]  n next, p previous, a column name sorts"
        )
        print("(the same name again reverses), a number shows that code, q quits")
        try:
            word = input("> ").strip()
        except EOFError:
            return
        if word == "q":
            return
        if word in ("n", ""):
            start = start + page if start + page < len(order) else start
        elif word == "p":
            start = max(0, start - page)
        elif word in COLUMNS:
            ascending = sorted(rows, key=lambda row, name=word: row[name])
            order, start = (ascending if order != ascending else ascending[::-1]), 0
        elif word.isdigit() and int(word) < len(rows):
            print(show([rows[int(word)]]))
        else:
            print(f"Unknown: {word!r}; columns are {', '.join(COLUMNS)}.")


@torch.no_grad()
def code_pictures(model, rows: list[dict], processor, limit: int = 64):
    """A grid of the most used codes, most used first: each is decoded from a 4 × 4 map of this code alone."""
    best = [row["code"] for row in sorted(rows, key=lambda row: -row["count"])[:limit]]
    codes = torch.tensor(best, device=model.device)[:, None, None].expand(-1, 4, 4)
    return as_grid(processor.postprocess(model.decode_codes(codes)), 16)


def model_folder(path: str) -> str:
    """`path` without a final `.pt`: `train_vqgan.py --model_name NAME.pt` writes the folder NAME.

    Raises:
        ValueError: `path` is a `.pt` file; a VQGAN is saved as a folder.
        FileNotFoundError: there is neither such a file nor such a folder.
    """
    if not path.endswith(".pt"):
        return path
    folder = Path(path.removesuffix(".pt"))
    if folder.is_dir():
        return str(folder)
    if Path(path).is_file():
        raise ValueError(f"{path} is a file of weights; --model_path needs a folder that train_vqgan.py wrote.")
    raise FileNotFoundError(
        f"Neither {path} nor the folder {folder} exists; --model_path needs a folder that train_vqgan.py wrote."
    )


def torch_device(name: str | None) -> torch.device:
    """The device called `name`; if None, the accelerator, or the CPU without one.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"Device {name!r} cannot be used here; give --device cpu.") from error


def open_images(args: AnalysisArguments, model, processor):
    """Images of --data_dir or procedural held-out ones, with the input and output channels of the model."""
    if args.data_dir:
        images = FolderImages(args.data_dir, processor)
        images.length = min(len(images), args.num_images)
    else:
        images = ProceduralImages(args.num_images, processor, first=FIRST_HELD_OUT)
    if model.config.out_channels != model.config.in_channels:
        images.target_processor = VQGANImageProcessor(
            processor.image_size, model.config.out_channels, processor.resize_mode, processor.size_divisor
        )
    return images


def main(argv: list[str] | None = None) -> dict:
    """Runs the analysis and returns its summary."""
    args = AnalysisArguments(**parse_recipe(__doc__, {"analysis": AnalysisArguments}, None, argv)["analysis"])
    if args.batch_size < 1 or args.num_images < 1 or args.temperature < 0:
        raise ValueError(
            "batch_size and num_images must be at least 1 and temperature not negative, "
            f"got {args.batch_size}, {args.num_images} and {args.temperature}."
        )
    args.model_path = model_folder(args.model_path)
    device = torch_device(args.device)
    model = load_pretrained(AutoModel, args.model_path).eval().to(device)
    processor = load_pretrained(AutoImageProcessor, args.model_path, "Image processor")
    if args.temperature > 0 and not isinstance(model.quantizer, EMAQuantizer):
        raise ValueError(f"temperature needs an ema quantizer; this model has {model.config.quantizer!r}.")
    if args.image_size is not None:
        if args.image_size < 1 or args.image_size % model.config.downsample_factor:
            raise ValueError(
                f"image_size must be a positive multiple of {model.config.downsample_factor}, got {args.image_size}."
            )
        processor.image_size = args.image_size
    images = open_images(args, model, processor)
    found = collect(model, images, args)
    counts, size = found["counts"], model.config.codebook_size
    summary = {
        "model": args.model_path,
        "data": args.data_dir or "procedural images",
        "images": len(images),
        "skipped_files": len(images.skipped),
        "codes_seen": int(counts.sum()),
        "codebook_size": size,
        **usage_of_counts(counts),
        "utilization_ceiling": utilization_ceiling(int(counts.sum()), size),
        "psnr": float(found["quality"][0]),
        "ssim": float(found["quality"][1]),
    }
    if args.temperature > 0:
        summary["sampled"] = {"temperature": args.temperature, **usage_of_counts(found["sampled"])}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = code_table(model, counts)
    (output / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    if args.save_details:
        with (output / "codes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        reconstruction_grid(*found["pictures"]).save(output / "reconstructions.png")
        code_pictures(model, rows, processor).save(output / "codes.png")
        if not plot_usage(counts, output / "usage.png", Path(args.model_path).name):
            print(NO_MATPLOTLIB)
    print(json.dumps(summary, indent=2))
    if args.interactive:
        browse(rows)
    else:
        ordered = sorted(rows, key=lambda row: -row["count"])
        print(show(ordered[:5] + ordered[-5:]))
    return summary


if __name__ == "__main__":
    run_recipe(main)
