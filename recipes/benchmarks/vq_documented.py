"""Trains the documented VQGAN settings at a small size, with and without their remedies against codebook collapse.

    python recipes/benchmarks/vq_documented.py --rows documented no_remedies entropy_weight_0.1 --steps 300
    python recipes/benchmarks/vq_documented.py --rows documented no_remedies --steps 1200 --seeds 3

Every row trains `configs/paper/train_vqgan.yaml` with the recipe's own trainer (all losses and the discriminator), but with
a small network on 32 px procedural images, in fp32, and for a number of steps; `ROWS` lists further changes. Rows of one
seed share initial weights and batches. Besides held-out use, entropy and PSNR the table has the lowest temperature of the
run, the share of vectors whose sampled code is the nearest one, the entropy of the sampling distribution as a share of
log K, and the norm of the entropy term's gradient at the encoder's output as a share of that of the reconstruction loss
(the lowest after the first epoch). Writes JSON after every row; the same command continues an interrupted run.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from tokcom_hf.cli import parse_recipe, read_yaml, run_recipe
from tokcom_hf.data.images import FIRST_HELD_OUT, ProceduralImages
from tokcom_hf.models.configuration_vqgan import VQGANConfig
from tokcom_hf.models.configuration_vqgan_discriminator import VQGANDiscriminatorConfig
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.modeling_vqgan_discriminator import VQGANDiscriminator
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.vqgan import VQGANTrainer, VQGANTrainingArguments

PAPER = Path(__file__).parents[1] / "configs" / "paper" / "train_vqgan.yaml"
# First of the images on which readings of the documents were compared; `--split held_out` never uses them.
FIRST_TUNING = 10_000_000
NETWORK = {
    "image_size": 32,
    "downsample_factor": 4,
    "patch_size": 4,
    "base_channels": 32,
    "channel_multipliers": [1],
    "num_res_blocks": 1,
    "mid_attention": False,
}
DISCRIMINATOR = {"base_channels": 16, "num_layers": 2}
NO_REMEDIES = {"model": {"temperature": 0.0, "entropy_weight": 0.0, "reset_fraction": 0.0}}
# What each row changes in the documented settings.
ROWS: dict[str, dict] = {
    "documented": {},
    "no_remedies": NO_REMEDIES,
    "problem": {
        "model": {
            "codebook_size": 512,
            "temperature": 1.2,
            "ema_decay": 0.85,
            "entropy_weight": 1.0,
            "reset_fraction": 0.0,
        },
    },
    # Other readings of the documented temperature, one change at a time.
    "scale_none": {"model": {"temperature_scale": "none", "entropy_temperature": 2.5}},
    "scale_dim": {"model": {"temperature_scale": "dim"}},
    "scale_mean": {"model": {"temperature_scale": "mean"}},
    "entropy_temperature_2.5": {"model": {"entropy_temperature": 2.5}},
    "entropy_of_choices": {"model": {"entropy_term": "choice"}},
    "temperature_falls": {"training": {"temperature_schedule": "linear", "temperature_anneal": 0.5}},
    # The nearest setting: the entropy term weaker, all else documented.
    "entropy_weight_0.1": {"model": {"entropy_weight": 0.1}},
    # One remedy less.
    "no_temperature": {"model": {"temperature": 0.0}},
    "no_entropy": {"model": {"entropy_weight": 0.0}},
    "no_resets": {"model": {"reset_fraction": 0.0}},
    # The documented advice for codebooks that still collapse.
    "temperature_3": {"model": {"temperature": 3.0}},
    "ema_decay_0.5": {"model": {"ema_decay": 0.5}},
    "codes_32": {"model": {"codebook_size": 32}},
    "batch_128": {"training": {"per_device_train_batch_size": 128}},
    "diversity": {"model": {"diversity_weight": 1.0}},
    "expansion": {"training": {"codebook_expansion": True}},
}


@dataclass
class BenchmarkArguments:
    """What to run."""

    rows: list[str] | str = field(
        default_factory=lambda: ["documented", "no_remedies"], metadata={"help": f"Rows to train: {', '.join(ROWS)}."}
    )
    steps: int = field(default=400, metadata={"help": "Training steps of each row."})
    seeds: int = field(default=1, metadata={"help": "Number of training seeds."})
    first_seed: int = field(default=0, metadata={"help": "The first of these seeds."})
    num_train: int = field(default=1024, metadata={"help": "Training images."})
    num_eval: int = field(default=512, metadata={"help": "Images of the split."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the model."})
    split: str = field(default="held_out", metadata={"help": "held_out (to report) or tune (to choose settings)."})
    output: str = field(default="outputs/vq_documented.json", metadata={"help": "JSON file of the rows."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 takes all cores."})


class Probe(TrainerCallback):
    """Records statistics of the codebook on one fixed batch, about `times` times in a run."""

    def __init__(self, trainer: VQGANTrainer, pixels: torch.Tensor, times: int = 12):
        self.trainer, self.pixels, self.times = trainer, pixels, times
        self.records: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, state.max_steps // self.times) == 0:
            with torch.random.fork_rng():
                self.records.append(
                    {"epoch": state.epoch} | codebook_statistics(self.trainer.unwrapped_model, self.pixels)
                )

    def report(self) -> dict[str, float]:
        """The run in four numbers: lowest temperature and gradient share, and the last record of the sampling."""
        settled = [row for row in self.records if row["epoch"] >= 1] or self.records
        return {
            "least_temperature": min(row["temperature"] for row in self.records),
            "least_gradient_share": min(row["gradient_share"] for row in settled),
            "nearest": self.records[-1]["nearest"],
            "draw_entropy": self.records[-1]["draw_entropy"],
        }


def codebook_statistics(model: VQGAN, pixels: torch.Tensor) -> dict[str, float]:
    """Statistics of a training step on `pixels`, without updating the codebook."""
    quantizer, config = model.quantizer, model.config
    training = model.training
    model.train()
    features = model.features(pixels).detach().requires_grad_()
    quantized = quantizer(features, learns=False)
    losses = model.losses(model.decoder(quantized.embeddings.permute(0, 3, 1, 2)), pixels, quantized)
    share = 0.0
    if config.entropy_weight:
        (reconstruction_gradient,) = torch.autograd.grad(losses["reconstruction_loss"], features, retain_graph=True)
        (entropy_gradient,) = torch.autograd.grad(config.entropy_weight * losses["entropy_loss"], features)
        share = float(entropy_gradient.norm() / reconstruction_gradient.norm())
    vectors = features.detach().reshape(-1, quantizer.width)
    entropy = 0.0
    if quantizer.temperature > 0:
        scale = quantizer.distance_scale(vectors)
        log_p = quantizer.assignment_logits(vectors, quantizer.temperature, scale).log_softmax(1)
        entropy = float(-(log_p.exp() * log_p).sum(1).mean() / torch.tensor(quantizer.codebook_size).log())
    nearest = quantizer.encode(features.detach())
    model.train(training)
    return {
        "temperature": quantizer.temperature,
        "gradient_share": share,
        "nearest": float((nearest == quantized.codes).float().mean()),
        "draw_entropy": entropy,
    }


def train_one(name: str, seed: int, args: BenchmarkArguments, folder: Path) -> dict:
    """Trains one row with one seed and measures it on the split."""
    paper, changes = read_yaml(PAPER.read_text(encoding="utf-8")), ROWS[name]
    settings = (
        paper["training"]
        | {
            "output_dir": str(folder),
            "max_steps": args.steps,
            "seed": seed,
            "learning_rate": args.learning_rate,
            "bf16": False,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "load_best_model_at_end": False,
            "early_stopping_patience": 0,
            "dataloader_num_workers": 0,
            "num_pictures": 0,
            "use_cpu": not torch.accelerator.is_available(),
            "disable_tqdm": True,
        }
        | changes.get("training", {})
    )
    processor = VQGANImageProcessor(32, size_divisor=4)
    first = {"held_out": FIRST_HELD_OUT, "tune": FIRST_TUNING}[args.split]
    train, held_out = ProceduralImages(args.num_train, processor), ProceduralImages(args.num_eval, processor, first)
    set_seed(seed)
    network = VQGAN(VQGANConfig(**paper["model"] | NETWORK))
    model = VQGAN(VQGANConfig(**paper["model"] | NETWORK | changes.get("model", {})))
    model.encoder.load_state_dict(network.encoder.state_dict())
    model.decoder.load_state_dict(network.decoder.state_dict())
    set_seed(seed)
    discriminator = VQGANDiscriminator(VQGANDiscriminatorConfig(**DISCRIMINATOR))
    trainer = VQGANTrainer(
        model,
        VQGANTrainingArguments(**settings),
        discriminator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
    )
    pixels = torch.stack([train[index]["pixel_values"] for index in range(64)]).to(trainer.args.device)
    probe = Probe(trainer, pixels)
    trainer.add_callback(probe)
    started = time.process_time()
    trainer.train()
    minutes = (time.process_time() - started) / 60
    metrics = trainer.evaluate()
    measured = {key: metrics[f"eval_{key}"] for key in ("utilization", "normalized_entropy", "psnr", "ssim")}
    row = {"row": name, "seed": seed, "steps": args.steps, "codes": model.config.codebook_size}
    return row | measured | probe.report() | {"cpu_minutes": minutes, "changes": changes}


def summary(rows: list[dict]) -> str:
    """Markdown table of means over seeds."""
    lines = [
        "| row | codes | seeds | steps | use % | entropy | PSNR dB | least temperature | drawn = nearest | draw entropy | "
        "gradient share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, steps in dict.fromkeys((row["row"], row["steps"]) for row in rows):
        mine = [row for row in rows if (row["row"], row["steps"]) == (name, steps)]
        mean = {
            key: sum(row[key] for row in mine) / len(mine) for key, value in mine[0].items() if type(value) is float
        }
        lines.append(
            f"| {name} | {mine[0]['codes']} | {len(mine)} | {steps} | {100 * mean['utilization']:.0f} | "
            f"{mean['normalized_entropy']:.3f} | {mean['psnr']:.2f} | {mean['least_temperature']:.2f} | "
            f"{100 * mean['nearest']:.0f} % | {mean['draw_entropy']:.2f} | {mean['least_gradient_share']:.2g} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs the rows and returns them."""
    args = BenchmarkArguments(**parse_recipe(__doc__, {"run": BenchmarkArguments}, None, argv)["run"])
    names = [args.rows] if isinstance(args.rows, str) else args.rows
    unknown = [name for name in names if name not in ROWS]
    if unknown or args.split not in ("held_out", "tune"):
        raise ValueError(f"rows are {', '.join(ROWS)}, and split held_out or tune; got {names} and {args.split!r}.")
    use_all_cores(args.threads)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.is_file() else []
    done = {(row["row"], row["seed"], row["steps"], row["split"]) for row in rows}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in names:
            if (name, seed, args.steps, args.split) in done:
                continue
            rows.append(train_one(name, seed, args, output.with_suffix("")) | {"split": args.split})
            output.write_text(json.dumps({"command": args.__dict__, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(summary(rows[-1:]).splitlines()[-1], flush=True)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    run_recipe(main)
