"""Figures of the text evaluation (matplotlib, extra "plots")."""

from pathlib import Path
from typing import Any

from .figures import drawn_or_not, pyplot, save


def setting_name(point: dict[str, Any]) -> str:
    """The sampling settings of one point of TokCom's frontier as text: "8 steps, temperature 0.9, best of 2"."""
    name = f"{point['num_steps']} steps, temperature {point['temperature']:g}"
    name += f", best of {point['best_of']}" if point.get("best_of", 1) > 1 else ""
    guidance = point.get("guidance_scale", 1.0)
    return name + (f", guidance {guidance:g}" if guidance != 1.0 else "")


@drawn_or_not
def draw_evaluation(out: Path, results: dict[str, Any]) -> None:
    """Draws the three figures of recipes/evaluate_tokcom.py into the folder `out`."""
    plot_accuracy_against_noise(results["reconstruction"], out / "accuracy_against_noise.png")
    plot_denoising_against_time(results["denoising"], out / "denoising.png")
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, points in results["frontier"].items():
        for point in points:
            line, label = name, f"T={point['temperature']:g}"
            if name == "TokCom":
                # One line per temperature, best-of and guidance; its points are numbers of steps.
                label = str(point["num_steps"])
                line = f"TokCom, {setting_name(point).partition(' steps, ')[2]}"
            curves.setdefault(line, []).append({**point, "label": label})
    shown = ("held-out text", "unigram", "Kneser-Ney 5-gram", "shuffled train chunks")
    keys = ("entropy", "kn_perplexity_held_out")
    anchors = {name: {key: results["rows"][name][key]["mean"] for key in keys} for name in shown}
    plot_frontier(curves, anchors, out / "frontier.png")


def plot_accuracy_against_noise(reconstruction: dict[str, float], path: Path) -> None:
    """Plots token and chunk accuracy of the VAE against latent noise σ (in latent standard deviations)."""
    figure, axes = _axes("latent noise σ / latent std", "held-out accuracy", "Decoding noisy latents")
    for name, label in (("token_accuracy", "token"), ("chunk_accuracy", "whole chunk")):
        axes.plot(*_against_noise(reconstruction, name), marker="o", label=label)
    axes.axhline(0.995, color="0.7", linewidth=0.8, linestyle="--")
    _save(figure, axes, path)


def plot_noise_curves(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots token accuracy against latent noise: one solid curve per VAE, a dashed one for its untrained control."""
    figure, axes = _axes("latent noise σ / latent std", "held-out token accuracy", "Decoding noisy latents")
    for name, row in rows.items():
        (line,) = axes.plot(*_against_noise(row, "token_accuracy"), marker="o", markersize=3, label=name)
        if "untrained" in row:
            control = _against_noise(row["untrained"], "token_accuracy")
            axes.plot(*control, linestyle="--", linewidth=1, color=line.get_color(), label=f"{name}, untrained")
    axes.axhline(0.995, color="0.7", linewidth=0.8, linestyle="--")
    _save(figure, axes, path)


def plot_denoising_against_time(denoising: dict[str, float], path: Path) -> None:
    """Plots token accuracy against t, decoding x_t directly, after one denoiser prediction, and after the whole flow."""
    figure, axes = _axes("t (0 noise, 1 clean)", "held-out token accuracy", "Denoising")
    for name, label in (
        ("reconstructed", "after the whole flow"),
        ("denoised", "after one denoiser prediction"),
        ("direct", "noisy latent decoded directly"),
    ):
        prefix = f"{name}_accuracy_t_"
        points = sorted((float(k.removeprefix(prefix)), v) for k, v in denoising.items() if k.startswith(prefix))
        if not points:
            continue
        axes.plot([t for t, _ in points], [v for _, v in points], marker="o", label=label)
    _save(figure, axes, path)


def plot_frontier(curves: dict[str, list[dict[str, Any]]], anchors: dict[str, dict[str, float]], path: Path) -> None:
    """Plots Kneser–Ney perplexity against unigram entropy: one line per curve, one cross per anchor.

    Args:
        curves: name -> points with `entropy`, `kn_perplexity_held_out` and a `label`, which is written beside the point.
        anchors: name -> dict with `entropy` and `kn_perplexity_held_out`.
    """
    figure, axes = _axes(
        "unigram entropy, nats", "perplexity under a 5-gram model of held-out text", "Quality and diversity"
    )
    for name, points in curves.items():
        axes.plot(*_columns(points), marker="o", markersize=3, linewidth=1, label=name)
        for point in points:
            axes.annotate(str(point["label"]), (point["entropy"], point["kn_perplexity_held_out"]), fontsize=5)
    for name, point in anchors.items():
        axes.scatter(*_columns([point]), marker="x", label=name)
    axes.set_yscale("log")
    _save(figure, axes, path)


@drawn_or_not
def plot_brier_lm(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots BrierLM of each row with its bootstrap error, one row below the other.

    Args:
        rows: name -> dict with `brier_lm`, `brier_lm_error`, and `kind` ("TokCom", "heads alone" or "autoregressive"), which
            gives the colour.
    """
    figure, axes = _axes("BrierLM (higher is better)", "", "BrierLM over continuations of 1 to 4 tokens")
    names = list(rows)[::-1]
    for kind in dict.fromkeys(row["kind"] for row in rows.values()):
        chosen = [name for name in names if rows[name]["kind"] == kind]
        x, error = ([rows[name][key] for name in chosen] for key in ("brier_lm", "brier_lm_error"))
        places = [names.index(name) for name in chosen]
        axes.errorbar(x, places, xerr=error, fmt="o", markersize=4, capsize=3, linewidth=1, label=kind)
    axes.set_yticks(range(len(names)), [name[-40:] for name in names], fontsize=7)
    _save(figure, axes, path)


def _against_noise(row: dict[str, float], name: str) -> tuple[list[float], list[float]]:
    prefix = f"{name}_sigma_"
    points = {0.0: row[name]}
    points |= {float(key.removeprefix(prefix)): value for key, value in row.items() if key.startswith(prefix)}
    return sorted(points), [points[sigma] for sigma in sorted(points)]


def _columns(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["entropy"] for point in points], [point["kn_perplexity_held_out"] for point in points]


def _axes(x: str, y: str, title: str):
    figure, axes = pyplot().subplots(figsize=(6.4, 4.2))
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure, axes, path: Path) -> None:
    axes.legend(fontsize=7)
    save(figure, path)
