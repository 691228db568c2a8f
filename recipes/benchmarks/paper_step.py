"""Runs one optimisation step of each TokCom stage at the full documented size, and measures its peak memory.

    python recipes/benchmarks/paper_step.py          # 24 layers of width 896, 1024 tokens; about 14 GiB and some minutes

Reads recipes/configs/paper/train_tokcom.yaml, runs the real trainers for one AdamW step on a row of random ids of the
CodeLlama vocabulary (only the tokenizer would need the Hub). Each stage runs in a separate process, with gradient
checkpointing, so that its peak memory is measured alone.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tokcom_hf import (
    DenoiserTrainer,
    DenoiserTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.cli import parse_recipe, read_yaml, run_recipe
from tokcom_hf.data.latent_rows import encode_rows

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "paper" / "train_tokcom.yaml"


@dataclass
class BenchmarkArguments:
    """What to run."""

    rows: int = field(default=1, metadata={"help": "Rows of 1024 tokens in the step."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in the backward."})
    only: str | None = field(default=None, metadata={"help": "'vae' or 'denoiser'; both by default."})
    stage: str | None = field(default=None, metadata={"help": "Run one stage in this process (internal)."})
    output: str = field(default="outputs/benchmarks/paper_step.json", metadata={"help": "Result file."})


class RandomRows(torch.utils.data.Dataset):
    """Rows of random token ids."""

    def __init__(self, rows: int, length: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self.ids):
            raise IndexError(index)
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(self.ids[index])}


def one_stage(arguments: BenchmarkArguments) -> None:
    """Builds the documented model, trains one step, prints one line of JSON."""
    paper = read_yaml(CONFIG.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = TokComConfig(**paper.get("flow", {}))
    rows = RandomRows(arguments.rows, paper["run"]["length"], config.vae.vocab_size - 1)
    model = TokComModel(config)
    with TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder, "max_steps": 1, "per_device_train_batch_size": arguments.rows, "save_strategy": "no",
            "eval_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1, "sample_every": 0,
            "gradient_checkpointing": arguments.gradient_checkpointing, "remove_unused_columns": False,
            "dataloader_num_workers": 0, "report_to": "none",
        }  # fmt: skip
        if arguments.stage == "vae":
            vae = model.vae
            del model
            values = paper["vae_training"] | shared
            trainer = TokComVAETrainer(model=vae, args=TokComVAETrainingArguments(**values), train_dataset=rows)
            trained = vae
        else:
            latents = encode_rows(model.vae, rows, Path(folder) / "latents.npy")
            values = paper["denoiser_training"] | shared
            trainer = DenoiserTrainer(model=model, args=DenoiserTrainingArguments(**values), train_dataset=latents)
            trained = model.denoiser
        # The last matrix, because the time embedding gets no gradient in the first step: adaLN-Zero starts at zero.
        watched = [p for p in trained.parameters() if p.dim() > 1][-1]
        before = watched.detach().clone()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    print(json.dumps({
        "parameters": trained.num_parameters(),
        "loss": loss,
        "moved": not torch.equal(before, watched),
        "seconds": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }))  # fmt: skip


def main() -> None:
    """Runs each stage in a process; prints and saves their measurements."""
    arguments = BenchmarkArguments(**parse_recipe(__doc__, {"benchmark": BenchmarkArguments})["benchmark"])
    if arguments.stage:
        one_stage(arguments)
        return
    results = {}
    for stage in (arguments.only,) if arguments.only else ("vae", "denoiser"):
        print(f"one step of the {stage} …", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[stage] = json.loads(output.splitlines()[-1])
        row = results[stage]
        print(f"{stage:>9}: {row['parameters']:,} parameters, loss {row['loss']:.3f}, weights moved: {row['moved']}, "
              f"{row['seconds']:.0f} s, peak {row['peak_gib']:.1f} GiB")  # fmt: skip
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arguments": vars(arguments), **results}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
