"""Trains a token merger and layer pruners for a vision-language model.

    accelerate launch recipes/train_token_pruning.py                            # small VLM, procedural scenes, CPU
    accelerate launch recipes/train_token_pruning.py --config recipes/configs/base/train_token_pruning.yaml \
        --train_file train.jsonl --eval_file val.jsonl                          # LLaVA-1.5-7B, your data
    accelerate launch recipes/train_token_pruning.py --resume_from_checkpoint true

Without `--base_model` the small LLaVA of `recipes/pretrain_vlm.py` is used, and trained first where it is missing.
Leaves in the output folder: the heads (`AutoModel.from_pretrained`), the processor, a model card and `results.json`.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from tokcom_hf import (
    LayerPrunerConfig,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMergerConfig,
    TokenPruningTrainer,
    TokenPruningTrainingArguments,
)
from tokcom_hf.cards import SCENES, card_dataset, write_model_card
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, scene_options, vqa_collator
from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.pruning_evaluation import evaluate_mode

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
    strategy: str | None = field(default=None, metadata={"help": "Training-free strategy instead (with LoRA only)."})
    keep: int | None = field(default=None, metadata={"help": "Tokens that the strategy keeps."})
    threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of a single process; all cores by default (accelerate launch alone gives one)."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32 or bfloat16."})


SECTIONS = {
    "run": RunArguments,
    "data": VQASourceArguments,
    "merger": TokenMergerConfig,
    "pruner": LayerPrunerConfig,
    "discriminator": PruningDiscriminatorConfig,
    "training": TokenPruningTrainingArguments,
}


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, aliases=TRAIN_TOKEN_PRUNING)
    run, source = RunArguments(**values["run"]), VQASourceArguments(**values["data"])
    upload = take_upload(values["training"])
    folder = RunFolder(run, "train_token_pruning")
    out = folder.path
    use_all_cores(run.threads)
    ensure_small_vlm(run.base_model, run.threads)
    started = time.time()
    set_seed(run.seed)
    base = AutoModelForImageTextToText.from_pretrained(run.base_model, dtype=run.dtype)
    processor = AutoProcessor.from_pretrained(run.base_model)
    train, held_out = load_vqa_rows(source, run.base_model)
    model = build_model(base, run, values)

    values["training"].pop("resume_from_checkpoint", None)
    arguments = values["training"] | {"output_dir": str(out), "seed": run.seed}
    args = TokenPruningTrainingArguments(**arguments)
    discriminator = None
    if args.adversarial_weight > 0:
        width = model.adapter.text_config.hidden_size
        discriminator = PruningDiscriminator(
            PruningDiscriminatorConfig(**values["discriminator"] | {"hidden_size": width})
        )
    trainer = TokenPruningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=vqa_collator(source, processor, kept=model.config.tokens_kept),
        generation_collator=vqa_collator(source, processor, answers=False, kept=model.config.tokens_kept),
        discriminator=discriminator,
    )
    folder.start({"": settings_of(SECTIONS, values)})
    trainer.train(folder.checkpoint(trainer.checkpoint_files()))
    trainer.use_averaged_weights()
    if args.lora_r:
        trainer.merge_lora()
    if not trainer.is_world_process_zero():
        return
    # What is pushed must not refer to a folder of this machine.
    whole = bool(args.lora_r) or (upload is not None and Path(run.base_model).is_dir())
    model.save_pretrained(out, include_base=True if whole else None)
    processor.save_pretrained(out)
    seconds = max(time.time() - started, trainer.training_seconds)
    report(out, model, processor, source, held_out, run, args, seconds, None if upload is None else upload.repo_id)
    folder.finish()
    if upload is not None:
        print("pushed to", upload.push(out))


def ensure_small_vlm(base_model: str, threads: int | None = None) -> None:
    """Trains the small LLaVA where the default base model does not exist yet."""
    if base_model != SMALL_VLM or (Path(base_model) / "config.json").is_file():
        return
    state = PartialState()
    state.wait_for_everyone()
    state.print(f"{SMALL_VLM} does not exist yet; training it first (recipes/pretrain_vlm.py)")
    sys.path.insert(0, str(Path(__file__).parent))
    import pretrain_vlm

    # All ranks take part: the training is distributed like this one.
    before, sys.argv = sys.argv, ["pretrain_vlm.py", "--overwrite"]
    if threads:
        sys.argv += ["--threads", str(threads)]
    try:
        pretrain_vlm.main()
    finally:
        sys.argv = before
    state.wait_for_everyone()


def build_model(base, run: RunArguments, values) -> PrunedVLM:
    """Fresh heads that fit the base model."""
    if run.strategy:
        return PrunedVLM.from_base(base, strategy=run.strategy, keep=run.keep)
    probe = PrunedVLM.from_base(base)
    width, features = probe.adapter.text_config.hidden_size, probe.adapter.feature_size
    merger = TokenMergerConfig(**values["merger"] | {"feature_size": features, "question_size": width})
    pruner = LayerPrunerConfig(**values["pruner"] | {"hidden_size": width})
    return PrunedVLM.from_base(base, merger if run.merger else None, pruner if run.pruners else None)


def report(out: Path, model, processor, source, held_out, run, args, seconds: float, repo_id: str | None) -> None:
    """All modes on the held-out rows: printed, saved and put into the model card."""
    collator = vqa_collator(source, processor, answers=False, kept=model.config.tokens_kept)
    modes = ("origin", "merge_only", "soft", "hard")
    table = {m: evaluate_mode(model, collator, held_out, m, args.eval_max_new_tokens) for m in modes}
    slim = {m: {k: v for k, v in r.items() if k not in ("scores", "answers")} for m, r in table.items()}
    results = {"base_model": run.base_model, "seed": run.seed, "seconds": round(seconds, 1), "modes": slim}
    if not (source.dataset_name or source.eval_file):
        results["scenes"] = scene_options(run.base_model)  # what eval_token_pruning.py draws its questions from
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_model_card(
        out,
        "token_pruning",
        tags=["token-pruning", "vision-language"],
        pipeline_tag="image-text-to-text",
        repo_id=repo_id,
        base=run.base_model,
        dataset=card_dataset(SCENES, source.dataset_name, source.dataset_config, source.eval_file),
        language="en" if not (source.dataset_name or source.eval_file) else None,
        measured={
            mode: {"accuracy": result["accuracy"]["all"], "flops_ratio": result["flops_ratio"]}
            for mode, result in slim.items()
        },
        base_model=run.base_model,
        modes=slim,
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


if __name__ == "__main__":
    run_recipe(main)
