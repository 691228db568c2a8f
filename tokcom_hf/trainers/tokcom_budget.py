"""What training a TokCom folder cost, counted from its checkpoints and one measured step of each stage."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import newest_state
from ..data.latent_rows import encode_rows
from ..metrics.compute import count_flops, count_training_flops
from .tokcom import DenoiserTrainer, DenoiserTrainingArguments, TokComVAETrainer, TokComVAETrainingArguments


def tokcom_budget(folder: str | Path, model: Any, rows: Any, draws: int = 16, batch_size: int = 4) -> dict[str, float]:
    """Tokens and floating-point operations of both training stages, encoding of the corpus included.

    Args:
        folder: output folder of recipes/train_tokcom.py, with the checkpoints of both stages.
        model: the `TokComModel` of that folder.
        rows: its training rows (items `input_ids`, `attention_mask`), all of one length. An epoch is as many rows as
            `results.json` of the folder says: more than these where the text was given several times (`offset_copies`).
        draws: denoiser steps averaged over (block sizes and self-conditioning are drawn at random).

    Returns:
        parameters, vae_tokens, denoiser_tokens, tokens (their sum), vae_flops, encode_flops, denoiser_flops, flops.

    Raises:
        FileNotFoundError: a stage left no complete checkpoint to read its epochs from.
    """
    length = len(rows[0]["input_ids"])
    count = _row_count(Path(folder), len(rows))
    tokens = {stage: _epochs(Path(folder) / stage) * count * length for stage in ("vae", "denoiser")}
    batch = [rows[index] for index in range(min(batch_size, len(rows)))]
    inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}
    per_token = {
        name: flops / (len(batch) * length) for name, flops in _step_flops(model, inputs, batch, draws).items()
    }
    vae_flops = tokens["vae"] * per_token["vae"]
    denoiser_flops = tokens["denoiser"] * per_token["denoiser"]
    encode_flops = count * length * per_token["encode"]
    return {
        "parameters": float(model.num_parameters()),
        "vae_tokens": tokens["vae"],
        "denoiser_tokens": tokens["denoiser"],
        "tokens": tokens["vae"] + tokens["denoiser"],
        "vae_flops": vae_flops,
        "encode_flops": encode_flops,
        "denoiser_flops": denoiser_flops,
        "flops": vae_flops + encode_flops + denoiser_flops,
    }


def _row_count(folder: Path, given: int) -> int:
    results = folder / "results.json"
    return int(json.loads(results.read_text(encoding="utf-8")).get("rows", given)) if results.is_file() else given


def _epochs(folder: Path) -> float:
    state = newest_state(folder)
    if state is None:
        raise FileNotFoundError(
            f"No complete checkpoint in {str(folder)!r}: its training length is unknown. Give --run.tokens or --run.flops "
            "instead of --run.match_tokcom."
        )
    return float(state["epoch"])


def _step_flops(model: Any, inputs: dict[str, torch.Tensor], rows: list[Any], draws: int) -> dict[str, float]:
    """Operations of one batch: VAE training step, encoding, denoiser training step (mean over draws)."""
    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = {
            "output_dir": scratch,
            "use_cpu": True,
            "report_to": "none",
            "sample_every": 0,
            "disable_tqdm": True,
        }
        vae_trainer = TokComVAETrainer(model=model.vae, args=TokComVAETrainingArguments(**common))
        model.vae.train().requires_grad_(True)
        vae = count_training_flops(lambda: vae_trainer.compute_loss(model.vae, inputs))
        model.zero_grad()
        model.eval()
        latent_rows = encode_rows(model.vae, rows, Path(scratch) / "latents.npy")
        with torch.no_grad():
            encode = count_flops(lambda: model.vae.encode(inputs["input_ids"]))
        trainer = DenoiserTrainer(model=model, args=DenoiserTrainingArguments(**common), train_dataset=latent_rows)
        batch = {name: torch.stack([latent_rows[i][name] for i in range(len(rows))]) for name in latent_rows[0]}
        model.train()
        total = 0
        for step in range(draws):
            trainer.state.global_step = step
            total += count_training_flops(lambda: trainer.compute_loss(model, batch))
            model.zero_grad()
        model.eval().requires_grad_(True)
    return {"vae": float(vae), "encode": float(encode), "denoiser": total / draws}
