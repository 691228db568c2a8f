"""Training cost of a TokCom folder: for each stage, tokens seen (from its checkpoints) times measured FLOPs per token."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from ..checkpoints import newest_state
from ..data.latent_rows import encode_rows
from ..metrics.compute import count_flops, count_training_flops
from ..model_folders import load_pretrained
from .tokcom import DenoiserTrainer, DenoiserTrainingArguments, TokComVAETrainer, TokComVAETrainingArguments
from .tokcom_distillation import DistillationTrainer, DistillationTrainingArguments

DISTILLED = "distilled"


def tokcom_budget(folder: str | Path, model: Any, rows: Any, draws: int = 16, batch_size: int = 4) -> dict[str, float]:
    """Tokens and FLOPs of all training stages of a model, including the encoding of the corpus.

    Args:
        folder: output folder of recipes/train_tokcom.py with the checkpoints of its stages; or its subfolder `distilled`,
            whose budget includes the stages before it.
        model: the `TokComModel` of that folder.
        rows: training rows of the model (items `input_ids`, `attention_mask`), all of one length. The number of rows per
            epoch is read from the folder's `results.json`; with `offset_copies` it is larger than `len(rows)`.
        draws: number of steps to average over in stages that draw block sizes, self-conditioning or a time of the student.
        batch_size: rows per measured step.

    Returns:
        parameters (of VAE, denoiser and context together); vae_tokens, denoiser_tokens, distilled_tokens and tokens, their
        sum; vae_flops, encode_flops, denoiser_flops, distilled_flops and flops, their sum. distilled_tokens and
        distilled_flops are 0 if the folder is not that of a distilled model.

    Raises:
        FileNotFoundError: a stage left no complete checkpoint to read its epochs from.
    """
    folder, stages = Path(folder), ["vae", "denoiser"]
    if folder.name == DISTILLED and (folder.parent / "denoiser").is_dir():
        folder, stages = folder.parent, [*stages, DISTILLED]
    length = len(rows[0]["input_ids"])
    count = _row_count(folder, len(rows))
    tokens = {stage: _epochs(folder / stage) * count * length for stage in stages}
    batch = [rows[index] for index in range(min(batch_size, len(rows)))]
    steps = _StepFlops(model, batch, draws)
    per_token = {"vae": steps.vae(folder), "denoiser": steps.denoiser()}
    if DISTILLED in stages:
        per_token[DISTILLED] = steps.distilled(folder)
    flops = {f"{stage}_flops": tokens[stage] * cost / (len(batch) * length) for stage, cost in per_token.items()}
    # With a context encoder blocks start at any token, so that each step encodes its own rows; denoiser_flops count this.
    whole_rows = model.context is None
    flops["encode_flops"] = count * length * steps.encode() / (len(batch) * length) if whole_rows else 0.0
    named = {f"{stage}_tokens": value for stage, value in tokens.items()}
    return {
        "parameters": float(model.num_parameters()),
        "distilled_tokens": 0.0,
        "distilled_flops": 0.0,
        **named,
        **flops,
        "tokens": sum(tokens.values()),
        "flops": sum(flops.values()),
    }


def _row_count(folder: Path, given: int) -> int:
    results = folder / "results.json"
    return int(json.loads(results.read_text(encoding="utf-8")).get("rows", given)) if results.is_file() else given


def _epochs(folder: Path) -> float:
    state = newest_state(folder)
    if state is None:
        raise FileNotFoundError(
            f"No complete checkpoint in {str(folder)!r}, so the length of its training is unknown. Give --run.tokens or "
            "--run.flops instead of --run.match_tokcom."
        )
    return float(state["epoch"])


class _StepFlops:
    """FLOPs of one step of each stage on the batch `rows`; the model is in evaluation mode afterwards."""

    def __init__(self, model: Any, rows: list[Any], draws: int):
        self.model, self.rows, self.draws = model, rows, draws
        self.inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def vae(self, folder: Path) -> float:
        """FLOPs of a step of stage 1; `folder` holds its VAE, which may have parts that the whole model lacks."""
        own = (folder / "vae" / "config.json").is_file()
        vae = load_pretrained(AutoModel, folder / "vae") if own else self.model.vae
        vae.train().requires_grad_(True)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = TokComVAETrainer(model=vae, args=TokComVAETrainingArguments(**_arguments(scratch)))
            return self._mean(trainer, vae, self.inputs, 1)

    def encode(self) -> float:
        """FLOPs of encoding the batch."""
        with torch.no_grad():
            return float(count_flops(lambda: self.model.vae.encode(self.inputs["input_ids"])))

    def denoiser(self) -> float:
        """FLOPs of a step of stage 2."""
        model, inputs = self.model, self.inputs
        rows: Any = self.rows
        with tempfile.TemporaryDirectory() as scratch:
            if model.context is None:
                rows = encode_rows(model.vae, rows, Path(scratch) / "latents.npy")
                inputs = {name: torch.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
            trainer = DenoiserTrainer(
                model=model, args=DenoiserTrainingArguments(**_arguments(scratch)), train_dataset=rows
            )
            return self._mean(trainer, model, inputs, self.draws)

    def distilled(self, folder: Path) -> float:
        """FLOPs of a step of distillation; `folder` is that of the teacher, which takes more steps than the student."""
        file, student = folder / "config.json", self.model.config.num_steps
        teacher = json.loads(file.read_text(encoding="utf-8")).get("num_steps") if file.is_file() else None
        with tempfile.TemporaryDirectory() as scratch:
            args = DistillationTrainingArguments(
                **_arguments(scratch), student_steps=student, teacher_steps=max(teacher or 8, student + 1)
            )
            trainer = DistillationTrainer(args=args, teacher=self.model, train_dataset=self.rows)
            return self._mean(trainer, trainer.model, self.inputs, self.draws)

    def _mean(self, trainer: Any, model: Any, inputs: dict[str, torch.Tensor], draws: int) -> float:
        model.train()
        total = 0
        for step in range(draws):
            trainer.state.global_step = step
            total += count_training_flops(lambda: trainer.compute_loss(model, inputs))
            model.zero_grad()
        self.model.eval().requires_grad_(True)
        return total / draws


def _arguments(scratch: str) -> dict[str, Any]:
    return {"output_dir": scratch, "use_cpu": True, "report_to": "none", "sample_every": 0, "disable_tqdm": True}
