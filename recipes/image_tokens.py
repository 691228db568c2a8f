"""The full circle: image → VQGAN codes → LFQ ids → a language model that generates ids → codes → image.

    accelerate launch recipes/image_tokens.py                                     # procedural scenes, CPU, minutes
    accelerate launch recipes/image_tokens.py --image_tokenizer outputs/train_vqgan --base outputs/my_llm
    accelerate launch recipes/image_tokens.py --image_text_file train.jsonl --eval_file val.jsonl \
        --base Qwen/Qwen3-0.6B --image_tokenizer user/vqgan-lfq --bf16

Lines of a JSONL file: {"image": "a.png", "caption": "..."}. Without `--image_tokenizer` a VQGAN with `quantizer="lfq"` is
trained first; without `--base` a small Llama that has read captions. Trains the language model to continue a caption with
the image's tokens, then draws held-out captions. Leaves a folder that `pipeline("lfq-image-text", model=folder)` and
`AutoModel` load, with the VQGAN in `image_decoder/`, `results.json`, `generated.png` and `completed.png`. On procedural
scenes every generated picture is checked for the shapes and colours of its caption, by comparison with renderings.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import LlamaConfig, set_seed

from tokcom_hf import LFQExpandedConfig, LFQExpandedModel, LFQProcessor, VQGANConfig, VQGANTrainingArguments
from tokcom_hf.cards import SCENES, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.caption_images import CaptionImageCollator, CaptionImages, CaptionTokens, caption_of, draw_scenes
from tokcom_hf.data.captions import SceneArguments, check_image_text_files, read_image_text_jsonl
from tokcom_hf.data.vqa_collator import require_placeholder
from tokcom_hf.evaluation.lfq_drawing import evaluate_drawing, tokenize_images
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.model_folders import check_base, checked_folder
from tokcom_hf.models.pipeline_lfq import DECODER_FOLDER
from tokcom_hf.run_arguments import require_positive
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.image_token_stages import base_model, image_tokenizer
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.base import CompressionTrainer, CompressionTrainingArguments

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "image_tokens.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """What is trained on what, and how pictures are drawn."""

    image_tokenizer: str | None = field(default=None, metadata={"help": "VQGAN with quantizer lfq: folder or Hub id."})
    base: str | None = field(default=None, metadata={"help": "Causal language model: folder or Hub id."})
    image_text_file: str | None = field(default=None, metadata={"help": "JSON lines with image and caption."})
    eval_file: str | None = field(default=None, metadata={"help": "Held-out JSON lines of the same form."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the images; if not set, the folder of the JSON lines."}
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Let JSON lines name images by absolute paths or outside the image folder."}
    )
    train_images: int = field(
        default=16000, metadata={"help": "Procedural scenes to train on; those with a held-out caption are left out."}
    )
    eval_captions: int = field(default=200, metadata={"help": "Held-out captions to draw."})
    image_size: int = field(default=48, metadata={"help": "Pixels per side of the pictures."})
    grid: int = field(default=2, metadata={"help": "Cells per side of a scene."})
    dots: bool = field(default=False, metadata={"help": "Draw a small dot on one object of each scene."})
    min_objects: int = field(default=1, metadata={"help": "Fewest objects of a scene."})
    max_objects: int = field(default=2, metadata={"help": "Most objects of a scene."})
    image_prompt: str | None = field(
        default=None, metadata={"help": "Text before the image's tokens, with {caption} in it."}
    )
    caption_drop: float = field(default=0.1, metadata={"help": "Share of training rows without their caption."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Above 1 pictures follow the caption more closely."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of image tokens."})
    embedding_init_method: str = field(default="mean", metadata={"help": "Start of new rows: mean, random, zeros."})
    tune_llm: bool = field(default=True, metadata={"help": "Train the language model's layers, not only new rows."})
    freeze_original: bool = field(default=True, metadata={"help": "Keep the old vocabulary rows frozen."})
    base_steps: int = field(default=150, metadata={"help": "Steps of the small Llama's pretraining on captions."})
    output_dir: str = field(default="outputs/image_tokens", metadata={"help": "Folder of model, pictures, results."})
    threads: int = field(default=0, metadata={"help": "CPU threads of a single process; 0 takes all cores."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and training."})


SECTIONS = {
    "run": RunArguments,
    "vqgan": VQGANConfig,
    "vqgan_training": VQGANTrainingArguments,
    "base_model": LlamaConfig,
    "training": CompressionTrainingArguments,
}


class Parts(NamedTuple):
    """Image tokenizer, expanded language model, their processors, and the seconds that building them took."""

    decoder: Any
    image_processor: Any
    model: LFQExpandedModel
    processor: LFQProcessor
    seconds: dict[str, float]


def read_arguments(argv: list[str] | None):
    """Values of all sections, run and training arguments, and where the model is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run = RunArguments(**values["run"])
    check_image_text_files(run)
    check_drawing(run)
    # Only the finished folder is pushed, never the image tokenizer's own run.
    take_upload(values["vqgan_training"])
    upload = take_upload(values["training"])
    for section in ("vqgan_training", "training"):
        values[section].pop("resume_from_checkpoint", None)
    place = {"output_dir": run.output_dir}
    fixed = place | {"seed": run.seed, "remove_unused_columns": False, "report_to": "none"}
    args = CompressionTrainingArguments(**values["training"] | fixed)
    # What would stop a later stage is refused before the first one.
    for name in (run.image_tokenizer, run.base):
        if name is not None:
            check_base(name)
    if run.image_tokenizer is None:
        VQGANTrainingArguments(**values["vqgan_training"] | place)
        vqgan_config(run, values)
    return values, run, args, upload


def check_drawing(run: RunArguments) -> None:
    """Refuses what only the last training or the drawing would refuse."""
    require_positive(run, "train_images", "eval_captions", "image_size")
    SceneArguments(run.image_size, min_objects=run.min_objects, max_objects=run.max_objects, grid=run.grid)
    if run.base_steps < 0:
        raise RecipeError(f"--base_steps must be at least 0, got {run.base_steps}.")
    if not 0.0 <= run.caption_drop <= 1.0:
        raise RecipeError(f"--caption_drop is a share, from 0 to 1, got {run.caption_drop}.")
    for name in ("temperature", "guidance_scale"):
        if not 0.0 < getattr(run, name) < math.inf:
            raise RecipeError(f"--{name} must be a number above 0, got {getattr(run, name)}.")
    if run.image_prompt is not None:
        require_placeholder("image_prompt", run.image_prompt, "{caption}")
    LFQExpandedConfig(embedding_init_method=run.embedding_init_method)


def vqgan_config(run: RunArguments, values) -> VQGANConfig:
    """The configuration of an image tokenizer that is trained here."""
    return VQGANConfig(**{"image_size": run.image_size, **values["vqgan"]})


def stage_settings(values) -> dict[str, dict[str, Any]]:
    """Settings that determine the result of each stage: image tokenizer, small language model, whole model."""
    names = {DECODER_FOLDER: ("run", "vqgan", "vqgan_training"), "base": ("run", "base_model"), "": tuple(SECTIONS)}
    ignore = ("guidance_scale", "temperature")  # both act on the drawing only; an LFQ quantizer has no temperature
    return {
        stage: settings_of({name: SECTIONS[name] for name in sections}, values, ignore)
        for stage, sections in names.items()
    }


def build_data(run: RunArguments):
    """Training and held-out rows with caption and image; procedural training scenes have no held-out caption."""
    if run.image_text_file is not None:
        files = (run.image_text_file, run.eval_file or "")
        return tuple(read_image_text_jsonl(file, run.image_dir, run.allow_outside) for file in files)
    options = {"min_objects": run.min_objects, "max_objects": run.max_objects, "grid": run.grid, "dots": run.dots}
    held_out = draw_scenes(run.eval_captions, run.seed + 1, **options)
    captions = frozenset(caption_of(scene) for scene in held_out)
    drawn = draw_scenes(run.train_images, run.seed, **options)
    train = [scene for scene in drawn if caption_of(scene) not in captions]
    return CaptionImages(train, run.image_size), CaptionImages(held_out, run.image_size)


def expand(run: RunArguments, base: str, tokenizer, decoder):
    """The expanded model and its processor."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with checked_folder(base):
        model = LFQExpandedModel.from_base(
            base,
            output_dim=(decoder.config.codebook_size - 1).bit_length(),
            embedding_init_method=run.embedding_init_method,
            freeze_original=run.freeze_original,
            tokenizer=tokenizer,
        )
    if not run.tune_llm:
        model.freeze_base()
    start = getattr(tokenizer, "start_image_token", None) or "\n"
    prompt = run.image_prompt or "{caption} " + start
    return model.train(), LFQProcessor.from_model(model, tokenizer, image_prompt=prompt)


def build_model(run: RunArguments, values, folder: RunFolder, train, held_out) -> Parts:
    """Loads or trains the image tokenizer and the language model, and adds one id per code to the latter."""
    began = time.perf_counter()
    config = None if run.image_tokenizer else vqgan_config(run, values)
    decoder, image_processor = image_tokenizer(run, config, values["vqgan_training"], folder, train, held_out)
    between = time.perf_counter()
    base, tokenizer = base_model(run, values["base_model"], folder, train)
    seconds = {"image_tokenizer": between - began, "base": time.perf_counter() - between}
    model, processor = expand(run, base, tokenizer, decoder)
    share = model.trainable_rows()
    PartialState().print(
        f"{share['trainable']:,} of {share['total']:,} vocabulary rows train ({100 * share['share']:.1f} %); "
        f"LFQ ids {model.lfq_token_range[0]:,} … {model.lfq_token_range[1] - 1:,}",
        flush=True,
    )
    return Parts(decoder, image_processor, model, processor, seconds)


def build_trainer(run: RunArguments, args: CompressionTrainingArguments, parts: Parts, train, held_out):
    """The trainer of the language model on captions, each with the codes of its image."""
    tokens = [
        CaptionTokens([row["caption"] for row in rows], tokenize_images(parts.decoder, parts.image_processor, rows))
        for rows in (train, held_out)
    ]
    return CompressionTrainer(
        parts.model,
        args,
        train_dataset=tokens[0],
        eval_dataset=tokens[1],
        data_collator=CaptionImageCollator(parts.processor, run.caption_drop),
    )


def report(
    run: RunArguments, folder: RunFolder, trainer, parts: Parts, held_out, results: dict[str, Any], upload
) -> None:
    """Draws held-out captions; saves the models; writes pictures, results.json and the card; prints a summary."""
    started = time.perf_counter()
    decoder, image_processor, model, processor, _ = parts
    tokens = trainer.eval_dataset
    results |= evaluate_drawing(model, processor, decoder, image_processor, held_out, tokens, run, folder.path)
    results["seconds"]["drawing"] = round(time.perf_counter() - started, 1)
    # A pushed model holds its base's weights, because nobody else has this machine's folder.
    whole = run.base is None or (upload is not None and Path(run.base).is_dir())
    with folder.whole() as place:
        model.save_pretrained(place, include_base=True if whole else None)
        processor.save_pretrained(place)
        decoder.save_pretrained(place / DECODER_FOLDER)
        image_processor.save_pretrained(place / DECODER_FOLDER)
    results["log"] = [row for row in trainer.state.log_history if "loss" in row]
    (folder.path / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    write_model_card(
        folder.path,
        "image_tokens",
        tags=["text-to-image", "lfq"],
        pipeline_tag="text-to-image",
        repo_id=None if upload is None else upload.repo_id,
        base=run.base,
        dataset=card_dataset(SCENES, file=run.image_text_file),
        measured={"generation_loss": results["generation_loss"], **results.get("drawn", {})},
        config=parts.model.config,
        results=results,
        run=run,
    )
    print(
        f"\ncross-entropy of held-out image tokens {results['generation_loss']:.3f} nats (of {results['codes']:,} codes)"
    )
    for name, row in results.get("drawn", {}).items():
        print(
            f"  {name:24s} shapes and colours {100 * row['shape_and_colour']:5.1f} %, at their places "
            f"{100 * row['place']:5.1f} %"
        )
    print(f"pictures: {folder.path / 'generated.png'}, {folder.path / 'completed.png'}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, draws, checks, saves; returns the results."""
    values, run, args, upload = read_arguments(argv)
    folder = RunFolder(run, "image_tokens", (DECODER_FOLDER, "base", ""), ("vqgan_run", "base_run"))
    use_all_cores(run.threads)
    set_seed(run.seed)
    train, held_out = build_data(run)
    folder.start(stage_settings(values))
    parts = build_model(run, values, folder, train, held_out)
    trainer = build_trainer(run, args, parts, train, held_out)
    folder.train(trainer)
    trainer.use_averaged_weights()
    trainer.data_collator = CaptionImageCollator(parts.processor)
    loss = trainer.evaluate()["eval_loss"]
    seconds = parts.seconds | {"training": trainer.training_seconds}
    results: dict[str, Any] = {
        "data": Path(run.image_text_file).name if run.image_text_file else "procedural scenes",
        "train_images": len(train),
        "held_out_captions": len(held_out),
        "steps": trainer.state.global_step,
        "seed": run.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "parameters": parts.model.num_parameters(),
        "generation_loss": loss,
        "codes": parts.decoder.config.codebook_size,
    }
    if trainer.is_world_process_zero():
        report(run, folder, trainer, parts, held_out, results, upload)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(folder.path), flush=True)
    return results


if __name__ == "__main__":
    run_recipe(main)
