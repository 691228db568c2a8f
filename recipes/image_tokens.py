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
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, LlamaConfig, set_seed

from tokcom_hf import VQGAN, LFQExpandedModel, LFQProcessor, VQGANConfig, VQGANImageProcessor, VQGANTrainingArguments
from tokcom_hf.cards import SCENES, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.caption_images import CaptionImageCollator, CaptionImages, CaptionTokens, caption_of, draw_scenes
from tokcom_hf.data.captions import read_image_text_jsonl
from tokcom_hf.evaluation.lfq_drawing import evaluate_drawing, tokenize_images
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import Upload, take_upload
from tokcom_hf.models.pipeline_lfq import DECODER_FOLDER
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.image_tokenizer import train_image_tokenizer
from tokcom_hf.small_models.small_llama import train_caption_llama
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
    image_dir: str | None = field(default=None, metadata={"help": "Folder of the images; the file's own if not set."})
    allow_outside: bool = field(
        default=False, metadata={"help": "Let JSON lines name images by absolute paths and outside that folder."}
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
    guidance_scale: float = field(default=2.0, metadata={"help": "Above 1 the caption counts more."})
    temperature: float = field(default=1.0, metadata={"help": "Of the drawn tokens."})
    embedding_init_method: str = field(default="mean", metadata={"help": "Start of new rows: mean, random, zeros."})
    tune_llm: bool = field(default=True, metadata={"help": "Train the language model's layers, not only new rows."})
    freeze_original: bool = field(default=True, metadata={"help": "Old vocabulary rows never move."})
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, draws, checks, saves; returns the results."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run = RunArguments(**values["run"])
    if bool(run.image_text_file) != bool(run.eval_file):
        raise RecipeError("--image_text_file and --eval_file (held-out lines of the same form) belong together.")
    # The finished folder is pushed, not the image tokenizer's own run.
    take_upload(values["vqgan_training"])
    upload = take_upload(values["training"])
    state = PartialState()
    folder = RunFolder(run, "image_tokens", (DECODER_FOLDER, "base", ""), ("vqgan_run", "base_run"))
    output = folder.path
    use_all_cores(run.threads)
    set_seed(run.seed)
    train, held_out = load_rows(run)
    seconds: dict[str, float] = {}
    for section in ("vqgan_training", "training"):
        values[section].pop("resume_from_checkpoint", None)
    args = CompressionTrainingArguments(
        **values["training"]
        | {"output_dir": str(output), "seed": run.seed, "remove_unused_columns": False, "report_to": "none"}
    )
    if run.image_tokenizer is None:
        # Refused now, not when it is its turn.
        VQGANTrainingArguments(**values["vqgan_training"] | {"output_dir": str(output)})
        VQGANConfig(**{"image_size": run.image_size, **values["vqgan"]})
    folder.start(stage_settings(values))

    started = time.perf_counter()
    decoder, image_processor = image_tokenizer(run, values, folder, train, held_out, state)
    seconds["image_tokenizer"] = time.perf_counter() - started
    started = time.perf_counter()
    base, tokenizer = base_model(run, values, folder, train, state)
    seconds["base"] = time.perf_counter() - started
    model, processor = expand(run, base, tokenizer, decoder)
    share = model.trainable_rows()
    state.print(
        f"{share['trainable']:,} of {share['total']:,} vocabulary rows train ({100 * share['share']:.1f} %); "
        f"LFQ ids {model.lfq_token_range[0]:,} … {model.lfq_token_range[1] - 1:,}",
        flush=True,
    )
    tokens = {
        name: CaptionTokens([row["caption"] for row in rows], tokenize_images(decoder, image_processor, rows))
        for name, rows in (("train", train), ("held_out", held_out))
    }
    trainer = CompressionTrainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["held_out"],
        data_collator=CaptionImageCollator(processor, run.caption_drop),
    )
    folder.train(trainer)
    seconds["training"] = trainer.training_seconds
    trainer.use_averaged_weights()
    trainer.data_collator = CaptionImageCollator(processor)
    loss = trainer.evaluate()["eval_loss"]
    results: dict[str, Any] = {
        "data": Path(run.image_text_file).name if run.image_text_file else "procedural scenes",
        "train_images": len(train),
        "held_out_captions": len(held_out),
        "steps": trainer.state.global_step,
        "seed": run.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "parameters": model.num_parameters(),
        "generation_loss": loss,
        "codes": decoder.config.codebook_size,
    }
    if trainer.is_world_process_zero():
        started = time.perf_counter()
        results |= evaluate_drawing(
            model, processor, decoder, image_processor, held_out, tokens["held_out"], run, output
        )
        results["seconds"]["drawing"] = round(time.perf_counter() - started, 1)
        save(model, processor, decoder, image_processor, results, run, trainer, folder, upload)
    return results


def stage_settings(values) -> dict[str, dict[str, Any]]:
    """What decides the results of the image tokenizer, the small language model and the whole."""
    names = {DECODER_FOLDER: ("run", "vqgan", "vqgan_training"), "base": ("run", "base_model"), "": tuple(SECTIONS)}
    ignore = ("guidance_scale", "temperature")  # of the drawing, and of a sampling quantizer, which LFQ is not
    return {
        stage: settings_of({name: SECTIONS[name] for name in sections}, values, ignore)
        for stage, sections in names.items()
    }


def load_rows(run: RunArguments):
    """Training and held-out rows with caption and image; no held-out caption is trained on."""
    if run.image_text_file is not None:
        files = (run.image_text_file, run.eval_file or "")
        return tuple(read_image_text_jsonl(file, run.image_dir, run.allow_outside) for file in files)
    options = {"min_objects": run.min_objects, "max_objects": run.max_objects, "grid": run.grid, "dots": run.dots}
    held_out = draw_scenes(run.eval_captions, run.seed + 1, **options)
    captions = frozenset(caption_of(scene) for scene in held_out)
    drawn = draw_scenes(run.train_images, run.seed, **options)
    train = [scene for scene in drawn if caption_of(scene) not in captions]
    return CaptionImages(train, run.image_size), CaptionImages(held_out, run.image_size)


def image_tokenizer(run, values, folder: RunFolder, train, held_out, state):
    """The VQGAN that makes tokens: given, left by an interrupted run, or trained here."""
    output = folder.path
    name = run.image_tokenizer or (output / DECODER_FOLDER if folder.is_finished(DECODER_FOLDER) else None)
    if name is not None:
        decoder, image_processor = AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    else:
        config = VQGANConfig(**{"image_size": run.image_size, **values["vqgan"]})
        image_processor = VQGANImageProcessor(
            config.image_size, config.in_channels, size_divisor=config.downsample_factor
        )
        decoder = train_image_tokenizer(
            VQGAN(config),
            image_processor,
            crowded(run) or train,
            held_out,
            values["vqgan_training"],
            output / "vqgan_run",
            run.seed,
            partial(folder.train, stage=DECODER_FOLDER, folder="vqgan_run"),
        )
        if state.is_main_process:
            with folder.whole(DECODER_FOLDER) as place:
                decoder.save_pretrained(place)
                image_processor.save_pretrained(place)
        state.wait_for_everyone()
        folder.finish(DECODER_FOLDER)
    if getattr(decoder.config, "quantizer", None) != "lfq":
        raise RecipeError(
            f"{name} is no VQGAN with quantizer='lfq' (got {getattr(decoder.config, 'quantizer', 'none')!r}); its "
            "codes have no bits."
        )
    return decoder.eval().requires_grad_(False), image_processor


def crowded(run: RunArguments) -> CaptionImages | None:
    """Scenes with most cells filled, from which an image tokenizer learns shapes faster; None with the user's images."""
    if run.image_text_file is not None:
        return None
    cells = run.grid * run.grid
    scenes = draw_scenes(
        min(4000, run.train_images),
        run.seed + 2,
        dots=run.dots,
        min_objects=cells // 2,
        max_objects=cells,
        grid=run.grid,
    )
    return CaptionImages(scenes, run.image_size)


def base_model(run, values, folder: RunFolder, train, state):
    """The language model to expand: given, left by an interrupted run, or a small Llama trained on the captions."""
    place = folder.path / "base"
    if run.base is None and not folder.is_finished("base"):
        captions = [train[index]["caption"] for index in range(len(train))]
        small, tokenizer = train_caption_llama(
            captions, values["base_model"], run.base_steps, folder.path / "base_run", run.seed, folder.resumes
        )
        if state.is_main_process:
            with folder.whole("base") as unfinished:
                small.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
        state.wait_for_everyone()
        folder.finish("base")
    name = run.base or str(place)
    return name, AutoTokenizer.from_pretrained(name)


def expand(run, base: str, tokenizer, decoder):
    """The expanded model and its processor."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
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


def save(model, processor, decoder, image_processor, results, run, trainer, folder: RunFolder, upload: Upload | None):
    """Model, processor, image decoder, card, JSON, and the lines a user reads."""
    output = folder.path
    # What is pushed must not refer to a folder of this machine.
    whole = run.base is None or (upload is not None and Path(run.base).is_dir())
    with folder.whole() as place:
        model.save_pretrained(place, include_base=True if whole else None)
        processor.save_pretrained(place)
        decoder.save_pretrained(place / DECODER_FOLDER)
        image_processor.save_pretrained(place / DECODER_FOLDER)
    results["log"] = [row for row in trainer.state.log_history if "loss" in row]
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    write_model_card(
        output,
        "image_tokens",
        tags=["text-to-image", "lfq"],
        pipeline_tag="text-to-image",
        repo_id=None if upload is None else upload.repo_id,
        base=run.base,
        dataset=card_dataset(SCENES, file=run.image_text_file),
        language="en" if run.image_text_file is None else None,
        measured={"generation_loss": results["generation_loss"], **results.get("drawn", {})},
        config=model.config,
        results=results,
        run=run,
    )
    folder.finish()
    print(
        f"\ncross-entropy of held-out image tokens {results['generation_loss']:.3f} nats (of {results['codes']:,} codes)"
    )
    for name, row in results.get("drawn", {}).items():
        print(
            f"  {name:24s} shapes and colours {100 * row['shape_and_colour']:5.1f} %, at their places "
            f"{100 * row['place']:5.1f} %"
        )
    print(f"pictures: {output / 'generated.png'}, {output / 'completed.png'}")
    if upload is not None:
        print("pushed to", upload.push(output))


if __name__ == "__main__":
    run_recipe(main)
