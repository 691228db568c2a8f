"""The report of recipes/train_tokcom.py: metrics of each stage, samples, model cards and figures."""

import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..cards import EMBEDDED_TEXT, card_dataset, write_model_card
from ..data.text import TextRows
from ..data.text_evaluation import TextSource
from .tokcom_denoising import denoising_metrics
from .tokcom_reconstruction import reconstruction_metrics
from .tokcom_report import measure_text, print_report

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def held_out_batch(rows: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `input_ids` and `attention_mask` of the first `count` rows of a data set, each (rows, length)."""
    batch = [rows[index] for index in range(min(count, len(rows)))]
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
    return ids, torch.stack([torch.as_tensor(row["attention_mask"]) for row in batch])


def measure_stage(stage: str, model: Any, held_out: Any) -> dict[str, float]:
    """Measures the held-out accuracy of the model that a stage has trained.

    Args:
        stage: "vae" measures reconstruction with latent noise of each of `SIGMAS`; any other stage measures denoising at
            each of `TIMES`.
        model: a `TokComVAE` for stage "vae", else a `TokComModel`.
        held_out: rows with `input_ids` and `attention_mask`, of which at most 128 ("vae") or 64 are used.
    """
    if stage == "vae":
        return reconstruction_metrics(model, *held_out_batch(held_out, 128), SIGMAS)
    return denoising_metrics(model, *held_out_batch(held_out, 64), TIMES)


def training_summary(trainer: Any, parameters: int) -> dict[str, Any]:
    """Returns a stage's entry in results.json: parameters, steps, seconds, first and last loss, last held-out losses."""
    history = trainer.state.log_history
    logs = [entry for entry in history if "loss" in entry]
    losses = {} if not logs else {"first_loss": logs[0]["loss"], "last_loss": logs[-1]["loss"]}
    last: dict[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    held_out = {name: value for name, value in last.items() if name.startswith("eval_") and name.endswith("_loss")}
    steps = {
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.training_seconds, 1),
    }
    return steps | losses | held_out


def sample_texts(model: Any, tokenizer: Any, run: Any) -> dict[str, str]:
    """Generates `run.sample_chunks` chunks without a prompt ("generated") and after `run.prompt` ("conditional")."""
    settings = {"num_steps": run.sample_steps, "generator": torch.Generator().manual_seed(run.seed)}
    generated = model.generate(num_chunks=run.sample_chunks, **settings)[0]
    prompt = tokenizer(run.prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    continued = model.generate(prompt, num_generate_chunks=run.sample_chunks, **settings)[0]
    return {
        "generated": tokenizer.decode(generated, skip_special_tokens=True),
        "conditional": tokenizer.decode(continued, skip_special_tokens=True),
    }


def draw_figures(folder: Path, results: Mapping[str, Any]) -> str:
    """Draws the figures whose data `results` has, accuracy against latent noise and against t; returns a line to print."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed (pip install 'tokcom_hf[plots]')"
    from ..plots.text import plot_accuracy_against_noise, plot_denoising_against_time

    drawn = []
    if "token_accuracy" in results.get("vae", {}):
        drawn.append(folder / "accuracy_against_noise.png")
        plot_accuracy_against_noise(results["vae"], drawn[-1])
    if "denoised_accuracy_t_0.5" in results.get("denoiser", {}):
        drawn.append(folder / "denoising_against_time.png")
        plot_denoising_against_time(results["denoiser"], drawn[-1])
    return "figures: " + (", ".join(map(str, drawn)) or "none")


def card_data(source: TextSource) -> dict[str, Any]:
    """Returns the values of a model card that describe the training text."""
    file = source.train_file and Path(source.train_file).name
    return {
        "dataset": card_dataset(EMBEDDED_TEXT, source.dataset_name, source.dataset_config, source.train_file),
        "data": source.dataset_name or file or "the embedded English text",
    }


def report_vae(
    folder: Path, vae: Any, held_out: Any, source: TextSource, results: dict[str, Any], metrics: dict[str, float]
) -> None:
    """Writes results.json and the model card of stage 1 into `folder`, and prints a summary.

    Args:
        folder: folder of the saved VAE.
        vae: the trained `TokComVAE`.
        held_out: rows that `metrics` were measured on.
        source: training text.
        results: content of results.json; the accuracy of an untrained VAE is added in place.
        metrics: the part of `results` from `measure_stage`.
    """
    untrained = reconstruction_metrics(type(vae)(vae.config), *held_out_batch(held_out, 128), (0.0,))
    results["untrained_token_accuracy"] = untrained["token_accuracy"]
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    parameters = {"TokComVAE": results["parameters"]}
    card = {"parameters": parameters, "metrics": metrics, "measured": metrics, "samples": {}} | card_data(source)
    write_model_card(folder, "tokcom", tags=["text-compression"], pipeline_tag="feature-extraction", name="TokComVAE",
                     config=vae.config.to_dict(), **card)  # fmt: skip
    print(f"  held-out token accuracy {metrics['token_accuracy']:.4%}, chunk accuracy {metrics['chunk_accuracy']:.4%}, "
          f"token accuracy with noise 0.5 std {metrics['token_accuracy_sigma_0.5']:.4%}")  # fmt: skip


def report_model(
    folder: Path, model: Any, data: TextRows, run: Any, results: dict[str, Any], started: float, repo_id: str | None
) -> None:
    """Writes samples, results.json, model card and figures of a whole model into `folder`, and prints a report.

    Args:
        folder: folder of the saved model.
        model: `TokComModel`.
        data: training and held-out rows, and the tokenizer.
        run: arguments of the run: a `TextSource` with `seed`, `prompt`, `sample_chunks` and `sample_steps`.
        results: content of results.json; seconds, samples and the table of `measure_text` are added in place.
        started: start time of the run (`time.time()`).
        repo_id: `user/name` of the repository that the folder will be uploaded to, or None.
    """
    parts = [part["seconds"] for part in results.values() if isinstance(part, dict) and "seconds" in part]
    # Wall-clock time of this process, or the sum over the stages, which is larger after a resume.
    results["seconds"] = round(max(time.time() - started, sum(parts)), 1)
    results["samples"] = sample_texts(model, data.tokenizer, run)
    # Files before printing, so that they exist even if the terminal is closed.
    (folder / "samples.txt").write_text("\n\n---\n\n".join(results["samples"].values()) + "\n", encoding="utf-8")
    results["text"] = measure_text(model, data.train, data.validation, seed=run.seed, num_steps=run.sample_steps)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    # Metrics of the distilled model if there is one, not of its teacher.
    measured = results["vae"] | results["distilled" if "distilled" in results else "denoiser"]
    metrics = {name: value for name, value in measured.items() if "accuracy" in name or name.startswith("eval_")}
    parameters = {"TokCom": model.num_parameters(), "VAE part": model.vae.num_parameters()}
    card = {"parameters": parameters, "metrics": metrics, "measured": metrics, "samples": results["samples"]}
    write_model_card(folder, "tokcom", tags=["text-generation", "flow-matching"], pipeline_tag="text-generation",
                     name="TokCom", repo_id=repo_id, config=model.config.to_dict(), **card | card_data(run))  # fmt: skip
    print_report(results, run.prompt)
    print(f"{draw_figures(folder, results)}\n\nmodel, tokenizer, card and results in {folder} after "
          f"{results['seconds']:.0f} s; load it with\n  AutoModel.from_pretrained({str(folder)!r})")  # fmt: skip
