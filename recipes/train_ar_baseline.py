"""Trains the autoregressive baseline of TokCom: a Llama of equal size on the same text with the same tokenizer.

    python recipes/train_ar_baseline.py --match_tokcom outputs/tokcom --budget compute --output_dir outputs/ar_compute
    python recipes/train_ar_baseline.py --match_tokcom outputs/tokcom --budget tokens --output_dir outputs/ar_tokens
    python recipes/train_ar_baseline.py --train_file train.txt --validation_file development.txt \
        --parameters 8000000 --tokens 5000000

`--budget compute` stops when its floating-point operations (matrix products and attention, counted on a real step) reach
those of all of TokCom's stages together; `--budget tokens` when it has seen as many tokens as these. Name the same text as
TokCom was trained on (--train_file, --dataset_name, --split_seed); settings are chosen by the loss on development text
(--validation_file), as many of them as TokCom's were. All losses are nats per token. Leaves model, tokenizer, model card
and `budget.json`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaForCausalLM, set_seed

from tokcom_hf.cards import EMBEDDED_TEXT, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, load_source
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.metrics.compute import count_training_flops, matching_llama_config
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.trainers.base import CompressionTrainer, CompressionTrainingArguments
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
    flops: float | None = field(default=None, metadata={"help": "Or training operations."})
    num_layers: int | None = field(default=None, metadata={"help": "Depth; none takes the usual shape of that size."})
    head_dim: int = field(default=32, metadata={"help": "Width of an attention head."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer where nothing is matched."})
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained on the corpus."})
    length: int = field(default=256, metadata={"help": "Tokens per row where nothing is matched."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and training."})


SECTIONS = {"run": RunArguments, "data": TextSource, "training": CompressionTrainingArguments}


class CausalTrainer(CompressionTrainer):
    """Next-token loss in nats per token on rows of `input_ids` and `attention_mask`; padding does not count."""

    data_columns = ("input_ids", "attention_mask")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over tokens: Trainer shall divide by the accumulation steps, which it leaves to a Llama's loss.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model(**inputs, labels=labels, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return loss.detach(), outputs.logits.detach(), labels


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    if run.budget not in ("compute", "tokens"):
        raise RecipeError(f"--budget must be compute or tokens, got {run.budget!r}.")
    if run.match_tokcom is None and (run.parameters is None or (run.tokens is None) == (run.flops is None)):
        raise RecipeError("Give --match_tokcom FOLDER, or --parameters with either --tokens or --flops.")
    upload = take_upload(values["training"])
    folder = RunFolder(run, "train_ar_baseline")
    out = folder.path
    set_seed(run.seed)
    matched: dict[str, float] = {}
    length, tokenizer, size = run.length, run.tokenizer, run.parameters
    tokcom: Any = None
    if run.match_tokcom is not None:
        tokcom = AutoModel.from_pretrained(run.match_tokcom)
        length, tokenizer = tokcom.config.max_chunks * tokcom.config.vae.chunk_size, run.match_tokcom
    data = load_source(source, length, tokenizer, run.tokenizer_vocab_size)
    tokens, flops = run.tokens, run.flops
    if tokcom is not None:
        matched = tokcom_budget(run.match_tokcom, tokcom, data.train)
        size = int(matched["parameters"])
        tokens, flops = (matched["tokens"], None) if run.budget == "tokens" else (None, matched["flops"])
    config = matching_llama_config(
        int(size or 0), len(data.tokenizer), run.num_layers, run.head_dim, max(length + 1, 1025)
    )
    config.eos_token_id = config.pad_token_id = data.tokenizer.eos_token_id
    config.bos_token_id = data.tokenizer.eos_token_id
    model = LlamaForCausalLM(config)

    values["training"].pop("resume_from_checkpoint", None)
    training = {"seed": run.seed} | values["training"] | {"output_dir": str(out)}
    batch = int(training.get("per_device_train_batch_size", 8))
    step_flops = measure_step(model, data.train, batch)
    global_batch = batch * int(training.get("gradient_accumulation_steps", 1))
    step_tokens, step_flops = global_batch * length, step_flops * (global_batch / batch)
    steps = max(1, round(tokens / step_tokens if tokens else (flops or 0.0) / step_flops))
    print(f"baseline of {model.num_parameters():,} parameters ({config.num_hidden_layers} x {config.hidden_size}); {steps} "
          f"steps of {step_tokens} tokens and {step_flops:.3g} operations", flush=True)  # fmt: skip
    arguments = CompressionTrainingArguments(**training | {"max_steps": steps})
    trainer = CausalTrainer(
        model=model, args=arguments, train_dataset=data.train, eval_dataset=data.validation,
        processing_class=data.tokenizer,
    )  # fmt: skip
    folder.start({"": settings_of(SECTIONS, values, ignore=("tokens", "flops", "budget"))})
    folder.train(trainer)
    trainer.use_averaged_weights()
    loss = trainer.evaluate()["eval_loss"]
    print(f"held out: {loss:.4f} nats per token", flush=True)
    trainer.save_model(str(out))
    budget = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * step_tokens,
        "flops": steps * step_flops,
        "seconds": round(trainer.training_seconds, 1),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "matched": run.budget if matched else None,
        "tokcom": matched,
    }
    if trainer.is_world_process_zero():
        (out / "budget.json").write_text(json.dumps(budget, indent=2), encoding="utf-8")
        write_model_card(
            out,
            "ar_baseline",
            tags=["text-generation"],
            pipeline_tag="text-generation",
            repo_id=None if upload is None else upload.repo_id,
            dataset=card_dataset(EMBEDDED_TEXT, source.dataset_name, source.dataset_config, source.train_file),
            language="en" if not (source.dataset_name or source.train_file) else None,
            measured={"loss": loss, "perplexity": budget["held_out_perplexity"]},
            config=config,
            budget=budget,
            training=arguments,
            data=source.dataset_name
            or (Path(source.train_file).name if source.train_file else "the embedded English text"),
        )
        folder.finish()
        print(json.dumps(budget, indent=2))
        if upload is not None:
            print("pushed to", upload.push(out))


def measure_step(model: torch.nn.Module, rows: Any, batch_size: int) -> float:
    """Operations of one training step at `batch_size`."""
    ids = torch.stack([rows[index % len(rows)]["input_ids"] for index in range(batch_size)])
    flops = count_training_flops(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    model.zero_grad()
    return float(flops)


if __name__ == "__main__":
    run_recipe(main)
