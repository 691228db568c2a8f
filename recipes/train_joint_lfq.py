"""Trains a vision-language model to read and write images as LFQ tokens, together with the quantizer of these tokens.

    accelerate launch recipes/train_joint_lfq.py                                   # small InternVL, procedural scenes, CPU
    accelerate launch recipes/train_joint_lfq.py --image_text_file train.jsonl --eval_file val.jsonl \
        --config recipes/configs/base/train_joint_lfq.yaml --base OpenGVLab/InternVL3-1B-hf
    accelerate launch recipes/train_joint_lfq.py --tune_llm false                  # quantizer and new rows only
    accelerate launch recipes/train_joint_lfq.py --resume_from_checkpoint true

Lines of a JSONL file: {"image": "a.png", "caption": "...", "question": "...", "answer": "..."}; the last two are optional.
Without `--base` the small InternVL of `recipes/pretrain_internvl.py` is used, and trained first where it is missing.
Leaves in the output folder: `quantizer/` and `model/` (`AutoModel.from_pretrained`) with their cards, `results.json` and
`joint_training.png`. With `--push_to_hub --hub_model_id user/name` the two models become the repositories `user/name` and
`user/name-quantizer`.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForImageTextToText, set_seed

from tokcom_hf import JointLFQModel, JointLFQTrainer, JointLFQTrainingArguments, LFQConfig, equip_internvl
from tokcom_hf.cards import SCENES, card_dataset, write_model_card
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.captions import (
    JointLFQCollator,
    SceneArguments,
    check_image_text_files,
    read_image_text_jsonl,
    scene_caption_rows,
)
from tokcom_hf.data.vqa import VQACollator
from tokcom_hf.documented_names import TRAIN_JOINT_LFQ
from tokcom_hf.evaluation.lfq_joint import evaluate_joint
from tokcom_hf.evaluation.lfq_joint_report import print_report
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import RUN_MARKER, take_upload
from tokcom_hf.model_folders import check_base, load_pretrained
from tokcom_hf.plots.lfq import plot_joint_training
from tokcom_hf.plots.vqgan import NO_MATPLOTLIB
from tokcom_hf.run_arguments import require_positive
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.small_models.small_internvl import TileProcessor
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.lfq_joint_equipment import check_joint_settings

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_joint_lfq.yaml"
SMALL_INTERNVL = "outputs/small_internvl"
# The base model determines these settings of the quantizer.
FIXED = ("input_size", "llm_hidden_size", "num_tokens")


@dataclass
class RunArguments(RunFolderArguments):
    """What is trained on what, and where it goes."""

    base: str = field(default=SMALL_INTERNVL, metadata={"help": "InternVL by Hub name or folder."})
    output_dir: str = field(default="outputs/joint_lfq", metadata={"help": "Folder of models and reports."})
    image_text_file: str | None = field(default=None, metadata={"help": "JSON lines with image and caption."})
    eval_file: str | None = field(default=None, metadata={"help": "Held-out JSON lines of the same form."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the images; by default the folder of the JSON lines."}
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Let JSON lines name images by absolute paths or outside the image folder."}
    )
    train_images: int = field(default=4000, metadata={"help": "Procedural scenes to train on."})
    eval_images: int = field(default=400, metadata={"help": "Held-out procedural scenes, one question each."})
    questions_per_image: int = field(default=5, metadata={"help": "Questions about each training scene."})
    packed_questions: bool = field(
        default=False, metadata={"help": "Put all questions about an image in one sequence, masked from each other."}
    )
    prompt: str = field(default="<image> {question}", metadata={"help": "Prompt of a question."})
    caption_prompt: str = field(default="{caption}", metadata={"help": "Prompt of an image to be drawn."})
    quantizer_input: str = field(
        default="projected",
        metadata={
            "help": "Features that become codes: projected (the projector's output) or vision (the vision tower's)."
        },
    )
    expand_vocabulary: bool = field(
        default=True, metadata={"help": "Add the LFQ ids; false: images are read as codes and never drawn."}
    )
    embedding_init_method: str = field(
        default="mean", metadata={"help": "Start of the new rows: mean, random, zeros."}
    )
    embedding_init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the new rows."})
    freeze_original: bool = field(default=True, metadata={"help": "Keep the old vocabulary rows frozen."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32 or bfloat16."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a single process; all by default."})
    seed: int = field(default=42, metadata={"help": "Seed of data, weights and training."})


SECTIONS = {"run": RunArguments, "quantizer": LFQConfig, "training": JointLFQTrainingArguments}


def read_arguments(argv: list[str] | None):
    """Values of all sections, run and training arguments, and where the models are pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_JOINT_LFQ)
    run = RunArguments(**values["run"])
    if not run.expand_vocabulary:
        # Without LFQ ids no image is drawn, so there is no generation loss.
        values["training"]["generation_weight"] = 0.0
    check_image_text_files(run)
    require_positive(run, "train_images", "eval_images", "questions_per_image")
    check_joint_settings(run)
    if run.base != SMALL_INTERNVL:
        check_base(run.base)
    upload = take_upload(values["training"])
    own = {name: value for name, value in values["training"].items() if name != "resume_from_checkpoint"}
    args = JointLFQTrainingArguments(**own | {"output_dir": run.output_dir, "seed": run.seed})
    LFQConfig(**values["quantizer"])
    return values, run, args, upload


def ensure_small_internvl(base: str) -> None:
    """Trains the small InternVL if it is the base and not trained yet; resumes an interrupted training."""
    if base != SMALL_INTERNVL or (Path(base) / "results.json").is_file():
        return
    state = PartialState()
    state.wait_for_everyone()
    state.print(f"{SMALL_INTERNVL} does not exist yet; training it first (recipes/pretrain_internvl.py)", flush=True)
    sys.path.insert(0, str(Path(__file__).parent))
    import pretrain_internvl

    begun = (Path(base) / RUN_MARKER).is_file()
    pretrain_internvl.main(["--resume" if begun else "--overwrite"])
    state.wait_for_everyone()


def build_data(run: RunArguments):
    """Training and held-out rows."""
    if run.image_text_file:
        files = (run.image_text_file, run.eval_file)
        return tuple(read_image_text_jsonl(file, run.image_dir, run.allow_outside) for file in files)
    # Scenes as in the training of the small model; other models get scenes of 448 pixels.
    scenes, path = {"image_size": 448}, Path(run.base) / "results.json"
    if path.is_file():
        scenes = json.loads(path.read_text(encoding="utf-8")).get("scenes", scenes)
    drawn = SceneArguments(**scenes)
    train = scene_caption_rows(run.train_images, run.seed + 17, run.questions_per_image, drawn)
    return train, scene_caption_rows(run.eval_images, run.seed + 3_000_017, 1, drawn)


def build_model(run: RunArguments, quantizer: dict[str, Any]) -> tuple[JointLFQModel, TileProcessor, dict[str, int]]:
    """The base model with a quantizer and one new id per code; its processor; parameters by part."""
    processor = load_pretrained(TileProcessor, run.base, "Processor")
    base = load_pretrained(AutoModelForImageTextToText, run.base, dtype=run.dtype)
    expansion = {
        "enabled": run.expand_vocabulary,
        "embedding_init_method": run.embedding_init_method,
        "embedding_init_std": run.embedding_init_std,
        "freeze_original": run.freeze_original,
    }
    own = {name: value for name, value in quantizer.items() if name not in FIXED}
    config = {
        "model": {"vocab_expansion": expansion, "quantizer_input": run.quantizer_input},
        "quantizer": own | {"num_tokens": processor.image_seq_length},
    }
    model = equip_internvl(base, config, processor.tokenizer)
    parts = {"quantizer": model.quantizer.parameters(), "new rows": model.new_rows(), "base": base.parameters()}
    return model, processor, {name: sum(p.numel() for p in part) for name, part in parts.items()}


def build_trainer(run: RunArguments, args: JointLFQTrainingArguments, model, processor, data) -> JointLFQTrainer:
    """The trainer of quantizer, new rows and, with --tune_llm, the language model."""
    train, held_out = data
    return JointLFQTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=JointLFQCollator(processor, run.prompt, run.caption_prompt, run.packed_questions),
        generation_collator=VQACollator(processor, run.prompt, answers=False),
    )


def start_quantizer(trainer: JointLFQTrainer) -> tuple[float | None, float]:
    """Fits the quantizer to features before training; returns the share of variance lost (None: no fit) and seconds."""
    began = time.time()
    error = trainer.start_quantizer()
    if math.isfinite(error):
        text = f"quantizer fitted to features: {error:.1%} of their whitened variance is lost"
        PartialState().print(text, flush=True)
    return error if math.isfinite(error) else None, time.time() - began


def report(
    run: RunArguments, place: RunFolder, trainer: JointLFQTrainer, processor, results: dict[str, Any], upload
) -> None:
    """Saves the models; writes their cards, results.json and the figure; prints what was measured."""
    out, after = place.path, results["after"]
    repo_id = None if upload is None else upload.repo_id
    model = trainer.unwrapped_model
    # A pushed model holds its base's weights, because nobody else has this machine's folder.
    whole = repo_id is not None and Path(run.base).is_dir()
    with place.whole() as unfinished:
        model.quantizer.save_pretrained(unfinished / "quantizer")
        model.language_model.save_pretrained(
            unfinished / "model", **({"include_base": True if whole else None} if model.draws else {})
        )
        processor.save_pretrained(unfinished / "model")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    drawn = plot_joint_training(trainer.state.log_history, after, out / "joint_training.png")
    # The reports are copied because only the folders of the models are pushed.
    for file in (out / "results.json", out / "joint_training.png"):
        if file.is_file():
            shutil.copy(file, out / "model")
    for folder, template, task, tags in (
        ("quantizer", "lfq_quantizer", "feature-extraction", ["image-tokenizer", "lfq"]),
        ("model", "joint_lfq", "text-generation", ["image-text-to-text", "text-to-image", "lfq"]),
    ):
        pushed = None if repo_id is None else repo_id + ("-quantizer" if folder == "quantizer" else "")
        write_model_card(
            out / folder,
            template,
            tags=tags,
            pipeline_tag=task,
            repo_id=pushed,
            base=run.base,
            dataset=card_dataset(SCENES, file=run.image_text_file),
            measured=after,
            results=results,
            quantizer=model.quantizer.config,
            language_model=model.language_model.config,
            training=trainer.args,
        )
    print_report(results, model.quantizer.config.codebook_size, model.draws)
    print(NO_MATPLOTLIB if not drawn else f"figure: {out / 'joint_training.png'}")
    seconds = results["seconds"]
    print(f"models, cards and results in {out} after {seconds['pretraining']:.0f} s of pretraining and "
          f"{seconds['training']:.0f} s of joint training")  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, measures and saves; returns the results (empty on all ranks but the first)."""
    values, run, args, upload = read_arguments(argv)
    folder = RunFolder(run, "train_joint_lfq", folders=("quantizer", "model"))
    use_all_cores(run.threads)
    started = time.time()
    ensure_small_internvl(run.base)
    pretraining = time.time() - started
    set_seed(run.seed)
    train, held_out = build_data(run)
    model, processor, parameters = build_model(run, values["quantizer"])
    sizes = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    counts = f"{len(train):,} training and {len(held_out):,} held-out images"
    PartialState().print(f"{counts}; parameters: {sizes}", flush=True)
    trainer = build_trainer(run, args, model, processor, (train, held_out))
    folder.start({"": settings_of(SECTIONS, values)})
    before = evaluate_joint(trainer, held_out)
    start_error, starting = start_quantizer(trainer)
    folder.train(trainer)
    trainer.use_averaged_weights()
    after = evaluate_joint(trainer, held_out)
    if not trainer.is_world_process_zero():
        return {}
    results = {
        "before": before,
        "after": after,
        "parameters": parameters,
        "start_error": start_error,
        "steps": trainer.state.global_step,
        "train_images": len(train),
        "held_out_images": len(held_out),
        "data": Path(run.image_text_file).name if run.image_text_file else "procedural scenes",
        "base": run.base,
        "quantizer_input": run.quantizer_input,
        "seed": run.seed,
        "seconds": {
            "pretraining": round(pretraining, 1),
            "training": round(starting + trainer.training_seconds, 1),
        },
    }
    report(run, folder, trainer, processor, results, upload)
    folder.finish()
    if upload is not None:
        place = folder.path
        print("pushed to", upload.push(place / "model"), upload.push(place / "quantizer", "-quantizer"))
    return results


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_recipe(main)
