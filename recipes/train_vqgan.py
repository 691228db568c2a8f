"""Trains a VQGAN: images to discrete codes and back, without codebook collapse.

    accelerate launch recipes/train_vqgan.py                                   # procedural images, small enough for a CPU
    accelerate launch recipes/train_vqgan.py --image_dir photos --image_size 128
    accelerate launch recipes/train_vqgan.py --train_dir photos --val_dir held_out --epochs 100 --device cuda --use_amp
    accelerate launch recipes/train_vqgan.py --config recipes/configs/base/train_vqgan.yaml --dataset_name NAME
    accelerate launch recipes/train_vqgan.py --resume_from_checkpoint true     # go on after an interruption

Leaves in the output folder: the model (`AutoModel.from_pretrained`), its image processor, a model card, `results.json`,
`reconstructions.png`, `codebook.png`, `history.png`, and the discriminator in `discriminator/`.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, set_seed

from tokcom_hf.cards import IMAGES, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.images import ImageSource, image_datasets
from tokcom_hf.documented_names import TRAIN_VQGAN
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import Upload, take_upload
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.models.configuration_vqgan import VQGANConfig
from tokcom_hf.models.configuration_vqgan_discriminator import VQGANDiscriminatorConfig
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.modeling_vqgan_discriminator import VQGANDiscriminator
from tokcom_hf.plots.vqgan import NO_MATPLOTLIB, plot_history, plot_usage
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.vqgan import VQGANTrainer, VQGANTrainingArguments
from tokcom_hf.trainers.vqgan_pictures import reconstruction_grid

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_vqgan.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """What to train on and where to write."""

    output_dir: str = field(default="outputs/train_vqgan", metadata={"help": "Folder of the model and the reports."})
    model_dir: str | None = field(
        default=None, metadata={"help": "Parent folder of the model; with model_name, instead of output_dir."}
    )
    model_name: str | None = field(default=None, metadata={"help": "Name of the model's folder in model_dir."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of images; unreadable files are skipped."})
    val_dir: str | None = field(
        default=None, metadata={"help": "Folder of held-out images; without it every tenth image of image_dir."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set with an image column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    image_column: str = field(default="image", metadata={"help": "Column of the Hub data set."})
    num_train: int = field(default=4096, metadata={"help": "Procedural training images."})
    num_eval: int = field(default=512, metadata={"help": "Held-out images, at most."})
    init_from: str | None = field(default=None, metadata={"help": "VQGAN folder or Hub id to start from."})
    expand_codebook: int = field(default=0, metadata={"help": "With init_from: grow the codebook to this size."})
    threads: int = field(default=0, metadata={"help": "CPU threads of a single process; 0 takes all cores."})

    def __post_init__(self):
        if self.model_dir is None and self.model_name is None:
            return
        if self.output_dir != type(self).output_dir:
            raise ValueError(
                f"output_dir {self.output_dir!r} and model_dir/model_name name two folders for the model; give one of them."
            )
        folder, name = Path(self.output_dir).parent, Path(self.output_dir).name
        self.output_dir = str(Path(self.model_dir or folder) / (self.model_name or name).removesuffix(".pt"))


SECTIONS = {
    "run": RunArguments,
    "model": VQGANConfig,
    "discriminator": VQGANDiscriminatorConfig,
    "training": VQGANTrainingArguments,
}


def read_arguments(argv: list[str] | None):
    """Values of all sections, run and training arguments, the model's configuration, and where the model is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_VQGAN)
    run = RunArguments(**values["run"])
    upload = take_upload(values["training"])
    values["training"].pop("resume_from_checkpoint", None)
    args = VQGANTrainingArguments(**values["training"] | {"output_dir": run.output_dir})
    config = load_pretrained(AutoConfig, run.init_from) if run.init_from else VQGANConfig(**values["model"])
    if run.expand_codebook and not run.init_from:
        raise RecipeError(
            f"--expand_codebook {run.expand_codebook} needs --init_from, the model whose codebook is to grow."
        )
    if not isinstance(config, VQGANConfig):
        raise RecipeError(f"--init_from {run.init_from} holds a {config.model_type!r} model, not a VQGAN.")
    channels = values["discriminator"].get("in_channels", config.out_channels)
    if args.adversarial_weight and channels != config.out_channels:
        raise RecipeError(
            f"discriminator.in_channels must be the model's {config.out_channels} out_channels, got {channels}: the "
            "discriminator sees the model's output. Leave it out."
        )
    return values, run, args, config, upload


def build_data(run: RunArguments, config: VQGANConfig):
    """The image processor, training images and held-out images."""
    processor = VQGANImageProcessor(config.image_size, config.in_channels, size_divisor=config.downsample_factor)
    target = None
    if config.out_channels != config.in_channels:
        target = VQGANImageProcessor(config.image_size, config.out_channels, size_divisor=config.downsample_factor)
    source = ImageSource(**{item.name: getattr(run, item.name) for item in fields(ImageSource)})
    return processor, *image_datasets(processor, source, target)


def build_model(run: RunArguments, config: VQGANConfig) -> VQGAN:
    """The model of --init_from, its codebook grown by --expand_codebook, or an untrained one."""
    model = load_pretrained(VQGAN, run.init_from) if run.init_from else VQGAN(config)
    if run.expand_codebook:
        model.expand_codebook(run.expand_codebook)
    return model


def build_trainer(values, args: VQGANTrainingArguments, model: VQGAN, data) -> VQGANTrainer:
    """The trainer of the model and, with an adversarial loss, of a discriminator of the model's output."""
    processor, train, held_out = data
    discriminator = None
    if args.adversarial_weight:
        settings = {"in_channels": model.config.out_channels, **values["discriminator"]}
        discriminator = VQGANDiscriminator(VQGANDiscriminatorConfig(**settings))
    given = {"train_dataset": train, "eval_dataset": held_out, "processing_class": processor}
    return VQGANTrainer(model, args, discriminator, **given)


def measure(trainer: VQGANTrainer, run: RunArguments) -> dict[str, Any]:
    """Evaluates the trained model on the held-out images; returns the contents of results.json."""
    metrics, train, held_out = trainer.evaluate(), trainer.train_dataset, trainer.eval_dataset
    return {
        "data": Path(run.image_dir).name if run.image_dir else run.dataset_name or "procedural images",
        "train_images": len(train),
        "held_out_images": len(held_out),
        "skipped_files": len(getattr(getattr(train, "dataset", train), "skipped", [])),
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "minutes": round(trainer.training_seconds / 60, 2),
        "parameters": trainer.unwrapped_model.num_parameters(),
        "metrics": {name.removeprefix("eval_"): value for name, value in metrics.items()},
    }


def report(folder: RunFolder, trainer: VQGANTrainer, run: RunArguments, results: dict, upload: Upload | None) -> None:
    """Saves the discriminator; draws pictures; writes results.json and the model card; prints a summary."""
    output = folder.path
    if trainer.discriminator is not None:
        with folder.whole("discriminator") as place:
            trainer.discriminator.save_pretrained(place)
    pair = trainer.held_out_pictures()
    if pair is not None:
        reconstruction_grid(*pair).save(output / "reconstructions.png")
    drawn = plot_usage(trainer.held_out.counts, output / "codebook.png", "held-out codes")
    if not (drawn and plot_history(trainer.state.log_history, output / "history.png")):
        print(NO_MATPLOTLIB)
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    config, metrics = trainer.unwrapped_model.config, results["metrics"]
    write_model_card(
        output,
        "vqgan",
        tags=["image-tokenizer", "vqgan", config.quantizer],
        pipeline_tag="image-to-image",
        repo_id=None if upload is None else upload.repo_id,
        dataset=card_dataset(IMAGES, run.dataset_name, file=run.image_dir),
        measured=metrics,
        config=config,
        training=trainer.args,
        results=results,
    )
    print(
        f"held-out, {results['held_out_images']} images: utilization {100 * metrics['utilization']:.1f} % of "
        f"{config.codebook_size} codes, normalized entropy {metrics['normalized_entropy']:.3f}, "
        f"PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}; {results['steps']} steps in "
        f"{results['minutes']} min"
    )
    print(f"reconstructions: {output / 'reconstructions.png'}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, measures and saves; returns the results."""
    values, run, args, config, upload = read_arguments(argv)
    folder = RunFolder(run, "train_vqgan", folders=("discriminator", "pictures"))
    use_all_cores(run.threads)
    set_seed(args.seed)
    data = build_data(run, config)
    model = build_model(run, config)
    trainer = build_trainer(values, args, model, data)
    folder.start({"": settings_of(SECTIONS, values)})
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.average = None
    results = measure(trainer, run)
    trainer.save_model(str(folder.path))
    if trainer.is_world_process_zero():
        report(folder, trainer, run, results, upload)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(folder.path))
    return results


if __name__ == "__main__":
    run_recipe(main)
