"""Figures of codebooks (needs matplotlib, extra `plots`)."""

from pathlib import Path

import numpy as np
import torch

from .figures import NO_MATPLOTLIB, drawn_or_not, pyplot, save

__all__ = ["NO_MATPLOTLIB", "plot_history", "plot_usage", "pyplot"]


@drawn_or_not
def plot_usage(counts: torch.Tensor, path: str | Path, title: str = "") -> None:
    """Plots the usage of each code, sorted, and its cumulative curve.

    Args:
        counts: how often each code occurs, `(codebook_size,)`.
        path: PNG file to write.
    """
    share = np.sort(counts.double().cpu().numpy())[::-1]
    share = share / max(share.sum(), 1e-300)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.2))
    left.bar(np.arange(len(share)), share, width=1.0)
    left.axhline(1 / len(share), color="black", linewidth=0.8, linestyle="--", label="uniform")
    left.set(xlabel="code, most used first", ylabel="share of vectors", title=title)
    left.legend()
    right.plot(np.arange(1, len(share) + 1) / len(share), share.cumsum())
    right.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    right.set(xlabel="share of codes", ylabel="share of vectors covered", xlim=(0, 1), ylim=(0, 1))
    save(figure, path)


@drawn_or_not
def plot_history(history: list[dict], path: str | Path) -> None:
    """Plots codebook utilization, normalised entropy and PSNR over training steps, from a trainer's log history."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.2))
    for axis, names in zip(axes, (("eval_utilization", "eval_normalized_entropy"), ("eval_psnr",)), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval_").replace("_", " "))
        axis.set(xlabel="optimizer step")
        axis.legend()
    save(figure, path)
