"""Trains a token merger and layer pruners for a vision-language model.

    accelerate launch recipes/train_token_pruning.py                            # small VLM, procedural scenes, CPU
    accelerate launch recipes/train_token_pruning.py --config recipes/configs/base/train_token_pruning.yaml \
        --train_file train.jsonl --eval_file val.jsonl                          # LLaVA-1.5-7B, your data
    accelerate launch recipes/train_token_pruning.py --task both    # also captions; first pretrain_vlm.py --captions true
    accelerate launch recipes/train_token_pruning.py --resume_from_checkpoint true
    accelerate launch recipes/train_token_pruning.py --mode optuna --n_trials 50    # recipes/search_token_pruning.py

Without `--base_model` the small LLaVA of `recipes/pretrain_vlm.py` is used, and trained first where it is missing.
Leaves in the output folder: the heads (`AutoModel.from_pretrained`), the processor, a model card and `results.json`.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from tokcom_hf import PrunedVLM, TokenPruningTrainer, TokenPruningTrainingArguments
from tokcom_hf.cards import SCENES, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, read_yaml, run_recipe
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, scene_options, vqa_collator
from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING
from tokcom_hf.evaluation.pruning_answers import evaluate_mode
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.gpus import use_gpus
from tokcom_hf.hub import RUN_MARKER, Upload, take_upload
from tokcom_hf.model_folders import check_base, load_pretrained
from tokcom_hf.models.pruning_families import check_family
from tokcom_hf.pruning_checkpoint import read_parts
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.pruning_build import (
    PRUNING_SECTIONS,
    build_discriminator,
    build_heads,
    check_heads,
    check_merge_budget,
    check_merge_numbers,
)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_token_pruning.yaml"
SMALL_VLM = "outputs/small_vlm"


@dataclass
class RunArguments(RunFolderArguments):
    """What is trained and where it goes."""

    base_model: str = field(default=SMALL_VLM, metadata={"help": "VLM by Hub name or folder."})
    output_dir: str = field(default="outputs/token_pruning", metadata={"help": "Folder of heads and reports."})
    seed: int = field(default=42, metadata={"help": "Seed of heads and training."})
    merger: bool = field(default=True, metadata={"help": "Train stage 1, the token merger."})
    pruners: bool = field(default=True, metadata={"help": "Train stage 2, the layer pruners."})
    strategy: str | None = field(default=None, metadata={"help": "Training-free strategy instead; trains LoRA only."})
    keep: int | None = field(default=None, metadata={"help": "Tokens that the strategy keeps."})
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from a documented run: a folder with token_merger_step_N.pt, layer_pruners_step_N.pt and "
            "discriminator_step_N.pt; a part without a file is newly initialised."
        },
    )
    init_step: int | None = field(default=None, metadata={"help": "N of these files; the largest where not set."})
    mode: str | None = field(
        default=None, metadata={"help": "train (if not set), or optuna, which runs search_token_pruning.py."}
    )
    search: bool | None = field(default=None, metadata={"help": "Search with Optuna, like --mode optuna."})
    trials: int | None = field(default=None, metadata={"help": "Trials of the search; 6 where not set."})
    available_gpus: list[int] | None = field(default=None, metadata={"help": "Numbers of the GPUs that may be used."})
    gpus_per_subtask: int | None = field(
        default=None, metadata={"help": "GPUs of one run; accelerate launch needs as many --num_processes."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a single process; all by default."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32 or bfloat16."})


SECTIONS = {"run": RunArguments, "data": VQASourceArguments, **PRUNING_SECTIONS}


def read_arguments(argv: list[str] | None) -> tuple[dict[str, Any], RunArguments, VQASourceArguments]:
    """Values of all sections, run arguments and arguments of the data."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_TOKEN_PRUNING)
    run = RunArguments(**values["run"])
    check_heads(values, run.strategy, run.keep, run.dtype)
    if run.init_from or run.init_step is not None:
        read_parts(run.init_from, run.init_step)
    if run.base_model == SMALL_VLM:
        vision = read_yaml((DEFAULT_CONFIG.parent / "pretrain_vlm.yaml").read_text(encoding="utf-8"))["vision"]
        check_merge_numbers(values["merger"], (vision["image_size"] // vision["patch_size"]) ** 2)
    return values, run, VQASourceArguments(**values["data"])


def wants_search(run: RunArguments) -> bool:
    """Whether the run is a hyper-parameter search.

    Raises:
        RecipeError: --trials without a search, or --mode and --search that contradict each other.
    """
    if run.mode not in (None, "train", "optuna"):
        raise RecipeError(f"--mode is train or optuna, got {run.mode!r}.")
    if (run.mode == "optuna" and run.search is False) or (run.mode == "train" and run.search):
        raise RecipeError(
            f"--mode {run.mode} and --search {str(run.search).lower()} contradict each other; leave one out."
        )
    wanted = run.mode == "optuna" or bool(run.search)
    if run.trials is not None and not wanted:
        raise RecipeError(
            f"--trials {run.trials} counts trials of a search; add --mode optuna or run recipes/search_token_pruning.py."
        )
    return wanted


def choose_gpus(run: RunArguments) -> None:
    """Restricts the run to --available_gpus; must be called before anything else uses a GPU."""
    message = use_gpus(run.available_gpus, run.gpus_per_subtask)
    if message:
        info(message)


def info(text: str) -> None:
    """Prints a line, on the main process only."""
    PartialState().print(f"[INFO] {text}", flush=True)


def ensure_small_vlm(base_model: str, threads: int | None = None) -> None:
    """Trains the small LLaVA if it is the base model and not trained yet; resumes an interrupted training."""
    # `results.json` is the last file that its training writes; the scenes in it are used here, too.
    if base_model != SMALL_VLM or (Path(base_model) / "results.json").is_file():
        return
    state = PartialState()
    state.wait_for_everyone()
    state.print(f"{SMALL_VLM} does not exist yet; training it first (recipes/pretrain_vlm.py)")
    sys.path.insert(0, str(Path(__file__).parent))
    import pretrain_vlm

    # All ranks take part: the training is distributed like this one.
    begun = (Path(base_model) / RUN_MARKER).is_file()
    pretrain_vlm.main(["--resume" if begun else "--overwrite", *(["--threads", str(threads)] if threads else [])])
    state.wait_for_everyone()


def build_data(run: RunArguments, source: VQASourceArguments):
    """Training and held-out rows."""
    return load_vqa_rows(source, run.base_model)


def build_model(run: RunArguments, values, parts: dict | None = None) -> PrunedVLM:
    """The base model with new heads, with the heads of `parts` (`read_parts`), or with a strategy."""
    base = load_pretrained(AutoModelForImageTextToText, run.base_model, dtype=run.dtype)
    if run.strategy:
        return PrunedVLM.from_base(base, strategy=run.strategy, keep=run.keep)
    if run.merger:
        info("Creating Token Merger...")
    if run.pruners:
        info("Creating Layer-Specific Pruners...")
    return build_heads(
        base, values["merger"] if run.merger else None, values["pruner"] if run.pruners else None, parts
    )


def collators(source: VQASourceArguments, processor, kept) -> dict[str, Any]:
    """Collators for training and for generated answers; `kept` maps vision tokens to those that the heads keep."""
    return {
        "data_collator": vqa_collator(source, processor, kept=kept),
        "generation_collator": vqa_collator(source, processor, answers=False, kept=kept),
    }


def build_trainer(
    model: PrunedVLM, processor, args: TokenPruningTrainingArguments, source: VQASourceArguments, data, discriminator
) -> TokenPruningTrainer:
    """The trainer; `data` is training and held-out rows."""
    given = {"train_dataset": data[0], "eval_dataset": data[1], "discriminator": discriminator}
    return TokenPruningTrainer(
        model=model, args=args, **given, **collators(source, processor, model.config.tokens_kept)
    )


def announce(model: PrunedVLM, args: TokenPruningTrainingArguments, given: dict) -> None:
    """Prints what is about to be trained."""
    info("Starting training...")
    if model.token_merger is not None:
        merger = model.token_merger.config
        target = "" if merger.target_merge_tokens is None else f"{merger.target_merge_tokens} tokens per image"
        # If the user gave no ratio, only the target has an effect.
        ratio = str(merger.merge_ratio) if not target or "merge_ratio" in given else ""
        info(f"Token Merger type: {merger.merger_type}")
        info(f"Merge Ratio: {', '.join(filter(None, (ratio, target)))}")
    if model.layer_pruner is not None:
        info(f"Pruning Layers: {model.layer_pruner.config.layers}")
    info(f"Temperature: {args.temperature_start} → {args.temperature_end}")


def report(
    folder: RunFolder,
    trainer: TokenPruningTrainer,
    processor,
    run: RunArguments,
    source: VQASourceArguments,
    started: float,
    upload: Upload | None,
) -> None:
    """Saves heads and processor, measures all modes on the held-out rows; writes results.json and card, prints a table."""
    out, model, held_out = folder.path, trainer.unwrapped_model, trainer.eval_dataset
    # A pushed model holds its base's weights, because nobody else has this machine's folder.
    whole = bool(trainer.args.lora_r) or (upload is not None and Path(run.base_model).is_dir())
    with folder.whole() as place:
        model.save_pretrained(place, include_base=True if whole else None)
        processor.save_pretrained(place)
    seconds = max(time.time() - started, trainer.training_seconds)
    modes = ("origin", "merge_only", "soft", "hard")
    length = trainer.args.eval_max_new_tokens
    table = {mode: evaluate_mode(model, trainer.generation_collator, held_out, mode, length) for mode in modes}
    summary = {
        m: {k: v for k, v in r.items() if k not in ("scores", "answers", "merged_tokens")} for m, r in table.items()
    }
    results = {"base_model": run.base_model, "seed": run.seed, "seconds": round(seconds, 1), "modes": summary}
    if not (source.dataset_name or source.eval_file):
        results["scenes"] = scene_options(run.base_model)  # what eval_token_pruning.py draws its questions from
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_model_card(
        out,
        "token_pruning",
        tags=["token-pruning", "vision-language"],
        pipeline_tag="image-text-to-text",
        repo_id=None if upload is None else upload.repo_id,
        base=run.base_model,
        dataset=card_dataset(SCENES, source.dataset_name, source.dataset_config, source.eval_file),
        measured={
            mode: {"accuracy": result["accuracy"]["all"], "flops_ratio": result["flops_ratio"]}
            for mode, result in summary.items()
        },
        base_model=run.base_model,
        modes=summary,
        questions=len(held_out),
        config=model.config.to_dict(),
    )
    print(f"{len(held_out)} held-out questions, {seconds:.0f} s of training and loading")
    print(f"{'mode':12s} {'accuracy':>8s} {'FLOPs':>7s} {'sequence':>8s}  vision tokens per layer")
    for mode, result in table.items():
        tokens = " ".join(f"{n:.0f}" for n in result["vision_tokens_per_layer"])
        print(
            f"{mode:12s} {100 * result['accuracy']['all']:7.1f}% {100 * result['flops_ratio']:6.1f}% "
            f"{100 * result['sequence_kept']:7.1f}%  {tokens}"
        )


def main(argv: list[str] | None = None) -> None:
    """Trains the heads, or searches their settings with --mode optuna."""
    values, run, source = read_arguments(argv)
    if wants_search(run):
        sys.path.insert(0, str(Path(__file__).parent))
        import search_token_pruning

        return search_token_pruning.search(values)
    choose_gpus(run)
    upload = take_upload(values["training"])
    folder = RunFolder(run, "train_token_pruning")
    values["training"].pop("resume_from_checkpoint", None)
    args = TokenPruningTrainingArguments(**values["training"] | {"output_dir": run.output_dir, "seed": run.seed})
    use_all_cores(run.threads)
    if run.base_model != SMALL_VLM:
        check_family(check_base(run.base_model))
    ensure_small_vlm(run.base_model, run.threads)
    started = time.time()
    set_seed(run.seed)
    info("Loading backbone and dataset...")
    processor = load_pretrained(AutoProcessor, run.base_model, "Processor")
    data = build_data(run, source)
    parts = read_parts(run.init_from, run.init_step) if run.init_from else {}
    model = build_model(run, values, parts)
    check_merge_budget(values["merger"], model.base, vqa_collator(source, processor), data[0])
    discriminator = None
    if args.adversarial_weight > 0:
        info("Creating Discriminator...")
        discriminator = build_discriminator(model, values["discriminator"], parts.get("discriminator"))
    info("Adding LoRA adapters to the frozen backbone..." if args.lora_r else "Freezing backbone parameters...")
    info("Creating Trainer...")
    trainer = build_trainer(model, processor, args, source, data, discriminator)
    folder.start({"": settings_of(SECTIONS, values)})
    announce(model, args, values["merger"])
    folder.train(trainer)
    trainer.use_averaged_weights()
    if args.lora_r:
        trainer.merge_lora()
    if trainer.is_world_process_zero():
        report(folder, trainer, processor, run, source, started, upload)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(folder.path))


if __name__ == "__main__":
    run_recipe(main)
