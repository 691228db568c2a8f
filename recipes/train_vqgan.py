"""Trains a VQGAN: images to discrete codes and back, without codebook collapse.

    accelerate launch recipes/train_vqgan.py                                   # procedural images, small enough for a CPU
    accelerate launch recipes/train_vqgan.py --image_dir photos --image_size 128
    accelerate launch recipes/train_vqgan.py --train_dir photos --val_dir held_out --epochs 100 --device cuda --use_amp
    accelerate launch recipes/train_vqgan.py --config recipes/configs/base/train_vqgan.yaml --dataset_name NAME
    accelerate launch recipes/train_vqgan.py --resume_from_checkpoint true     # go on after an interruption

Writes the model with its image processor and model card, `results.json`, `reconstructions.png`, `codebook.png` and
`history.png` into output_dir. The discriminator is saved beside it in `discriminator/`.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import set_seed

from tokcom_hf.cards import IMAGES, CardDataset, card_dataset, write_model_card
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.images import ImageSource, image_datasets
from tokcom_hf.documented_names import TRAIN_VQGAN
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
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
        default=None, metadata={"help": "With model_name instead of output_dir: its folder."}
    )
    model_name: str | None = field(
        default=None, metadata={"help": "With model_dir: name of the model's folder in it."}
    )
    image_dir: str | None = field(default=None, metadata={"help": "Folder of images; unreadable files are skipped."})
    val_dir: str | None = field(
        default=None, metadata={"help": "Folder of held-out images; without it every tenth image of image_dir."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set with an image column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    image_column: str = field(default="image", metadata={"help": "Column of the Hub data set."})
    num_train: int = field(default=4096, metadata={"help": "Procedural training images."})
    num_eval: int = field(default=512, metadata={"help": "Held-out images, at most."})
    init_from: str | None = field(default=None, metadata={"help": "VQGAN folder or Hub id to start from."})
    expand_codebook: int = field(default=0, metadata={"help": "With init_from: grow the codebook to this size."})
    threads: int = field(
        default=0, metadata={"help": "Processor threads of a run on one CPU process; 0 takes all cores."}
    )

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


def main(argv: list[str] | None = None) -> dict:
    """Runs the recipe and returns its results."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_VQGAN)
    run = RunArguments(**values["run"])
    upload = take_upload(values["training"])
    folder = RunFolder(run, "train_vqgan", folders=("discriminator", "pictures"))
    output = folder.path
    values["training"].pop("resume_from_checkpoint", None)
    args = VQGANTrainingArguments(**values["training"] | {"output_dir": run.output_dir})
    use_all_cores(run.threads)
    set_seed(args.seed)
    model = VQGAN.from_pretrained(run.init_from) if run.init_from else VQGAN(VQGANConfig(**values["model"]))
    if run.expand_codebook:
        model.expand_codebook(run.expand_codebook)
    config = model.config
    discriminator = None
    if args.adversarial_weight:
        settings = {"in_channels": config.out_channels, **values["discriminator"]}
        if settings["in_channels"] != config.out_channels:
            raise ValueError(
                f"The discriminator sees what the model makes: discriminator.in_channels must be its {config.out_channels} "
                f"out_channels, got {settings['in_channels']}; leave it out."
            )
        discriminator = VQGANDiscriminator(VQGANDiscriminatorConfig(**settings))
    processor = VQGANImageProcessor(config.image_size, config.in_channels, size_divisor=config.downsample_factor)
    target = VQGANImageProcessor(config.image_size, config.out_channels, size_divisor=config.downsample_factor)
    source = ImageSource(**{item.name: getattr(run, item.name) for item in fields(ImageSource)})
    train_set, eval_set = image_datasets(
        processor, source, target if config.out_channels != config.in_channels else None
    )
    trainer = VQGANTrainer(
        model,
        args,
        discriminator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
    )
    folder.start({"": settings_of(SECTIONS, values)})
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.average = None
    metrics = trainer.evaluate()
    trainer.save_model(str(output))
    results = {
        "data": Path(run.image_dir).name if run.image_dir else run.dataset_name or "procedural images",
        "train_images": len(train_set),
        "held_out_images": len(eval_set),
        "skipped_files": len(getattr(getattr(train_set, "dataset", train_set), "skipped", [])),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "minutes": round(trainer.training_seconds / 60, 2),
        "parameters": model.num_parameters(),
        "metrics": {name.removeprefix("eval_"): value for name, value in metrics.items()},
    }
    if trainer.is_world_process_zero():
        if discriminator is not None:
            with folder.whole("discriminator") as place:
                discriminator.save_pretrained(place)
        dataset = card_dataset(IMAGES, run.dataset_name, file=run.image_dir)
        write_results(trainer, results, output, dataset, None if upload is None else upload.repo_id)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(output))
    return results


def write_results(
    trainer: VQGANTrainer, results: dict, output: Path, dataset: CardDataset, repo_id: str | None
) -> None:
    """Pictures, JSON, model card and a few printed lines."""
    pair = trainer.held_out_pictures()
    if pair is not None:
        reconstruction_grid(*pair).save(output / "reconstructions.png")
    drawn = plot_usage(trainer.held_out.counts, output / "codebook.png", "held-out codes")
    if not (drawn and plot_history(trainer.state.log_history, output / "history.png")):
        print(NO_MATPLOTLIB)
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    config = trainer.unwrapped_model.config
    write_model_card(
        output,
        "vqgan",
        tags=["image-tokenizer", "vqgan", config.quantizer],
        pipeline_tag="image-to-image",
        repo_id=repo_id,
        dataset=dataset,
        measured=results["metrics"],
        config=config,
        training=trainer.args,
        results=results,
    )
    metrics = results["metrics"]
    print(
        f"held-out, {results['held_out_images']} images: utilization {100 * metrics['utilization']:.1f} % of "
        f"{config.codebook_size} codes, normalized entropy {metrics['normalized_entropy']:.3f}, "
        f"PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}; {results['steps']} steps in "
        f"{results['minutes']} min"
    )
    print(f"reconstructions: {output / 'reconstructions.png'}")


if __name__ == "__main__":
    run_recipe(main)
