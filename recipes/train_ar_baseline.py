"""Trains the autoregressive baseline of TokCom: a Llama of equal size on the same text with the same tokenizer.

    python recipes/train_ar_baseline.py --match_tokcom outputs/tokcom --budget compute --output_dir outputs/ar_compute
    python recipes/train_ar_baseline.py --match_tokcom outputs/tokcom --budget tokens --output_dir outputs/ar_tokens
    python recipes/train_ar_baseline.py --train_file train.txt --validation_file development.txt \
        --parameters 8000000 --tokens 5000000

`--budget compute` stops when the baseline's floating-point operations (matrix products and attention, counted on a real
step) reach those of all TokCom stages together; `--budget tokens` when it has seen as many tokens as these stages. Name the
text that TokCom was trained on (--train_file, --dataset_name, --split_seed). Choose settings by the loss on development text
(--validation_file), and try as many as were tried for TokCom. All losses are nats per token. Leaves model, tokenizer, model
card and `budget.json`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaForCausalLM, set_seed

from tokcom_hf.cards import write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text import TextRows
from tokcom_hf.data.text_evaluation import TextSource, load_source
from tokcom_hf.evaluation.tokcom_stage_report import card_data
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.metrics.compute import count_training_flops, matching_llama_config
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.trainers.base import CompressionTrainingArguments
from tokcom_hf.trainers.causal import CausalTrainer
from tokcom_hf.trainers.tokcom_budget import tokcom_budget

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_ar_baseline.yaml"


@dataclass
class RunArguments(RunFolderArguments):
    """What to match, and where to write."""

    output_dir: str = field(default="outputs/ar_baseline", metadata={"help": "Folder of the model."})
    match_tokcom: str | None = field(
        default=None, metadata={"help": "TokCom folder whose size, tokenizer, row length and budget are matched."}
    )
    budget: str = field(default="compute", metadata={"help": "With match_tokcom: 'compute' or 'tokens'."})
    parameters: int | None = field(default=None, metadata={"help": "Model size where nothing is matched."})
    tokens: float | None = field(default=None, metadata={"help": "Training tokens where nothing is matched."})
    flops: float | None = field(default=None, metadata={"help": "Training FLOPs, instead of --tokens."})
    num_layers: int | None = field(
        default=None, metadata={"help": "Layers; none takes the usual depth for the model size."}
    )
    head_dim: int = field(default=32, metadata={"help": "Width of an attention head."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer where nothing is matched."})
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained on the corpus."})
    length: int = field(default=256, metadata={"help": "Tokens per row where nothing is matched."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and training."})


SECTIONS = {"run": RunArguments, "data": TextSource, "training": CompressionTrainingArguments}


@dataclass
class Goal:
    """How large the baseline becomes and for how long it trains: for `tokens` tokens or `flops` operations.

    matched: size, tokens and operations of the TokCom model that is matched; empty where none is.
    """

    length: int
    parameters: int
    tokens: float | None
    flops: float | None
    matched: dict[str, float]


def read_arguments(argv: list[str] | None):
    """Values of all sections, run arguments, source of the text, training arguments by name, where the model is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv)
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    if run.budget not in ("compute", "tokens"):
        raise RecipeError(f"--budget must be compute or tokens, got {run.budget!r}.")
    if run.match_tokcom is None and (run.parameters is None or (run.tokens is None) == (run.flops is None)):
        raise RecipeError("Give --match_tokcom FOLDER, or --parameters with either --tokens or --flops.")
    upload = take_upload(values["training"])
    values["training"].pop("resume_from_checkpoint", None)
    training = {"seed": run.seed} | values["training"] | {"output_dir": run.output_dir}
    # Built here to refuse bad settings early; `max_steps` follows when a step's cost is measured.
    CompressionTrainingArguments(**training)
    return values, run, source, training, upload


def build_data(run: RunArguments, source: TextSource) -> tuple[TextRows, Goal]:
    """The rows, and the size and training budget of the baseline."""
    if run.match_tokcom is None:
        data = load_source(source, run.length, run.tokenizer, run.tokenizer_vocab_size)
        return data, Goal(run.length, int(run.parameters or 0), run.tokens, run.flops, {})
    tokcom = load_pretrained(AutoModel, run.match_tokcom)
    length = tokcom.config.max_chunks * tokcom.config.vae.chunk_size
    data = load_source(source, length, run.match_tokcom, run.tokenizer_vocab_size)
    matched = tokcom_budget(run.match_tokcom, tokcom, data.train)
    tokens, flops = (matched["tokens"], None) if run.budget == "tokens" else (None, matched["flops"])
    return data, Goal(length, int(matched["parameters"]), tokens, flops, matched)


def build_model(run: RunArguments, data: TextRows, goal: Goal) -> LlamaForCausalLM:
    """An untrained Llama of the goal's size with the tokenizer's vocabulary."""
    positions = max(goal.length + 1, 1025)
    config = matching_llama_config(goal.parameters, len(data.tokenizer), run.num_layers, run.head_dim, positions)
    config.eos_token_id = config.pad_token_id = data.tokenizer.eos_token_id
    config.bos_token_id = data.tokenizer.eos_token_id
    return LlamaForCausalLM(config)


def measure_step(model: torch.nn.Module, rows: Any, batch_size: int) -> float:
    """Operations of one training step at `batch_size`."""
    ids = torch.stack([rows[index % len(rows)]["input_ids"] for index in range(batch_size)])
    flops = count_training_flops(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    model.zero_grad()
    return float(flops)


def build_trainer(training: dict[str, Any], model: LlamaForCausalLM, data: TextRows, goal: Goal):
    """The trainer, with as many steps as the goal needs, and their cost: steps, tokens and operations."""
    batch = int(training.get("per_device_train_batch_size", 8))
    step_flops = measure_step(model, data.train, batch)
    global_batch = batch * int(training.get("gradient_accumulation_steps", 1))
    step_tokens, step_flops = global_batch * goal.length, step_flops * (global_batch / batch)
    steps = max(1, round(goal.tokens / step_tokens if goal.tokens else (goal.flops or 0.0) / step_flops))
    shape = f"{model.config.num_hidden_layers} x {model.config.hidden_size}"
    print(f"baseline of {model.num_parameters():,} parameters ({shape}); {steps} steps of {step_tokens} tokens and "
          f"{step_flops:.3g} operations", flush=True)  # fmt: skip
    args = CompressionTrainingArguments(**training | {"max_steps": steps})
    given = {"train_dataset": data.train, "eval_dataset": data.validation, "processing_class": data.tokenizer}
    cost = {"steps": steps, "tokens": steps * step_tokens, "flops": steps * step_flops}
    return CausalTrainer(model=model, args=args, **given), cost


def report(source: TextSource, folder: RunFolder, trainer, budget, upload) -> None:
    """Writes budget.json and the model card; prints the budget."""
    (folder.path / "budget.json").write_text(json.dumps(budget, indent=2), encoding="utf-8")
    write_model_card(
        folder.path,
        "ar_baseline",
        tags=["text-generation"],
        pipeline_tag="text-generation",
        repo_id=None if upload is None else upload.repo_id,
        measured={"loss": budget["held_out_loss"], "perplexity": budget["held_out_perplexity"]},
        config=trainer.unwrapped_model.config,
        budget=budget,
        training=trainer.args,
        **card_data(source),
    )
    print(json.dumps(budget, indent=2))


def main(argv: list[str] | None = None) -> None:
    """Trains for the budget, measures the held-out loss and saves."""
    values, run, source, training, upload = read_arguments(argv)
    folder = RunFolder(run, "train_ar_baseline")
    set_seed(run.seed)
    data, goal = build_data(run, source)
    model = build_model(run, data, goal)
    trainer, cost = build_trainer(training, model, data, goal)
    folder.start({"": settings_of(SECTIONS, values, ignore=("tokens", "flops", "budget"))})
    folder.train(trainer)
    trainer.use_averaged_weights()
    loss = trainer.evaluate()["eval_loss"]
    print(f"held out: {loss:.4f} nats per token", flush=True)
    trainer.save_model(str(folder.path))
    measured = {
        "seconds": round(trainer.training_seconds, 1),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "matched": run.budget if goal.matched else None,
        "tokcom": goal.matched,
    }
    if trainer.is_world_process_zero():
        report(source, folder, trainer, {"parameters": model.num_parameters()} | cost | measured, upload)
        folder.finish()
        if upload is not None:
            print("pushed to", upload.push(folder.path))


if __name__ == "__main__":
    run_recipe(main)
