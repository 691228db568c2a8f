"""The stages of TokCom's training: which stages a run trains or takes over, and what each saves beside its model.

A stage has the name of the folder of its checkpoints: "vae" (stage 1), "denoiser" (stage 2, whose model is saved in the
run's own folder) and "distilled" (stage 3).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel

from ..cli import RecipeError
from ..data.latent_rows import encode_rows, latent_statistics
from ..data.tokenizers import check_tokenizer
from ..fingerprints import settings_of
from ..model_folders import load_pretrained
from ..models.modeling_tokcom_vae import TokComVAE
from ..run_folders import RunFolder
from ..tokcom_checkpoint_writer import save_checkpoint

# Value of --stage -> the stages that the run trains, and the stages that it takes over from the output folder.
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vae": (("vae",), ()), "denoiser": (("denoiser",), ("vae",)), "distill": (("distilled",), ("vae", "denoiser")),
    "both": (("vae", "denoiser"), ()), "all": (("vae", "denoiser", "distilled"), ()),
}  # fmt: skip
# Sections of arguments that decide the result of a stage, in addition to those of the stages before it.
DECIDING = {
    "vae": ("run", "vae", "vae_training"), "denoiser": ("denoiser", "context", "flow", "denoiser_training"),
    "distilled": ("distillation_training",),
}  # fmt: skip


def stage_settings(
    stage: str, sections: Mapping[str, type], values: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings that decide the result of a stage, with those of the stages before it (`fingerprints.settings_of`).

    Args:
        stage: "vae", "denoiser" or "distilled".
        sections: name -> dataclass, as for `parse_recipe`.
        values: values that configuration file and command line set, by section.
    """
    order = list(DECIDING)
    names = [name for earlier in order[: order.index(stage) + 1] for name in DECIDING[earlier]]
    shown = ("stage", "prompt", "sample_chunks", "sample_steps", "pt_checkpoints")
    return settings_of({name: sections[name] for name in names}, values, ignore=shown)


def check_given(folder: RunFolder, choice: str, stage: str, settings: Mapping[str, Any]) -> None:
    """Checks that the options of a run describe the model that it takes over from `stage`.

    Args:
        folder: folder of the run.
        choice: value of --stage.
        stage: the stage that is taken over.
        settings: `stage_settings` of `stage` for this run.

    Raises:
        RecipeError: the model was trained with another value of an option.
    """
    recorded = {} if folder.marker is None else folder.marker["stages"].get(stage, {}).get("settings", {})
    sections = tuple(name for name in DECIDING[stage] if name != "run" and not name.endswith("_training"))
    for name, before in recorded.items():
        if name.partition(".")[0] in sections and settings.get(name, before) != before:
            raise RecipeError(
                f"--stage {choice} takes over the model of stage {stage!r}, which was trained with {name} {before!r}, not "
                f"{settings[name]!r}. Leave the option out, or train stage {stage!r} anew."
            )


def load_stage(folder: Path, tokenizer: Any, stage: str) -> Any:
    """Loads the VAE ("vae") or whole model ("denoiser") that an earlier run left in `folder`.

    Raises:
        RecipeError: there is no model in the folder.
        ValueError: model and tokenizer have different vocabularies.
    """
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"This stage goes on from what --stage {stage} trains, but there is no model in {str(folder)!r}; run --stage "
            f"{stage} first, or name its folder with --output_dir."
        )
    model = load_pretrained(AutoModel, folder)
    check_tokenizer(tokenizer, getattr(model, "vae", model).config)
    # Weights in a mapped file lie at any address, on which the last digits of products depend. In memory of their own they
    # act as after the stage before, in one process.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def read_results(folder: Path) -> dict[str, Any]:
    """The results that an earlier run measured for the VAE in `folder`; empty if there are none."""
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def fit_latents(model: Any, train: Any, held_out: Any, folder: Path) -> tuple[Any, Any]:
    """Sets mean and standard deviation of the VAE's latents in `model`; returns the rows for stage 2.

    Args:
        model: `TokComModel` with a trained VAE.
        train, held_out: rows with `input_ids` and `attention_mask`.
        folder: receives the latents for a model without a context: its blocks are whole rows, which are encoded once.

    Returns:
        Training and held-out rows, for a model without a context with their latents.
    """
    if model.context is not None:
        model.fit_latents(*latent_statistics(model.vae, train))
        if model.posterior is not None:
            model.posterior.fit(model, some_chunks(train, model.config.vae.chunk_size))
        return train, held_out
    # One process writes the files, the others read them.
    with PartialState().main_process_first():
        train = encode_rows(model.vae, train, folder / "train_latents.npy", description="encoding training rows")
        held_out = encode_rows(
            model.vae, held_out, folder / "validation_latents.npy", description="encoding held-out rows"
        )
    model.fit_latents(train.mean, train.std)
    return train, held_out


def some_chunks(rows: Any, chunk_size: int, count: int = 20_000) -> torch.Tensor:
    """Chunks (at most `count`, chunk_size) without padding, from the first of the rows."""
    chunks: list[torch.Tensor] = []
    for index in range(min(len(rows), -(-count * chunk_size // len(rows[0]["input_ids"])))):
        row = rows[index]
        ids, mask = (torch.as_tensor(row[name]).view(-1, chunk_size) for name in ("input_ids", "attention_mask"))
        chunks.append(ids[mask.bool().all(dim=1)])
    return torch.cat(chunks)[:count]


def keep_best(trainer: Any, model: Any, file: Path, run: Any) -> None:
    """Writes `best.json` of a stage beside its model and, with `run.pt_checkpoints`, the documented checkpoint `file`.

    Args:
        trainer: trainer of the stage, after its training.
        model: the model that it has trained.
        file: `best_vae.pt` or `best_diffusion.pt` in the run's folder.
        run: arguments of the run: `pt_checkpoints`, `length` and `tokenizer`.
    """
    if not trainer.is_world_process_zero():
        return
    best = trainer.best_model.record if trainer.args.load_best_model_at_end else None
    # For the VAE, the trainer has written best.json already: its folder of checkpoints is also that of the model.
    if best is not None and not isinstance(model, TokComVAE):
        (file.parent / "best.json").write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")
    if run.pt_checkpoints:
        step = trainer.state.global_step if best is None else best["step"]
        losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        epoch = trainer.state.epoch if best is None else best["epoch"]
        save_checkpoint(
            file, model, epoch=math.ceil(epoch - 1e-6), val_loss=losses.get(step), max_length=run.length,
            tokenizer_path=run.tokenizer or str(file.parent / "vae"),
        )  # fmt: skip
