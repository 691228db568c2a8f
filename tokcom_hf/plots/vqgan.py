"""Figures of codebooks (needs matplotlib, extra `plots`)."""

from pathlib import Path

import numpy as np
import torch

NO_MATPLOTLIB = "matplotlib is not installed, so no plots are drawn; pip install 'tokcom_hf[plots]'."


def pyplot():
    """matplotlib.pyplot without a display, or None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_usage(counts: torch.Tensor, path: str | Path, title: str = "") -> bool:
    """Histogram of code use (sorted) and its cumulative curve.

    Args:
        counts: `(codebook_size,)`.
        path: PNG file to write.

    Returns:
        whether a file was written; False where matplotlib is missing.
    """
    plt = pyplot()
    if plt is None:
        return False
    share = np.sort(counts.double().cpu().numpy())[::-1]
    share = share / max(share.sum(), 1e-300)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.bar(np.arange(len(share)), share, width=1.0)
    left.axhline(1 / len(share), color="black", linewidth=0.8, linestyle="--", label="uniform")
    left.set(xlabel="code, most used first", ylabel="share of vectors", title=title)
    left.legend()
    right.plot(np.arange(1, len(share) + 1) / len(share), share.cumsum())
    right.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    right.set(xlabel="share of codes", ylabel="share of vectors covered", xlim=(0, 1), ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_history(history: list[dict], path: str | Path) -> bool:
    """Usage, normalised entropy and PSNR over training steps, from a trainer's log history."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, names in zip(axes, (("eval_utilization", "eval_normalized_entropy"), ("eval_psnr",)), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval_").replace("_", " "))
        axis.set(xlabel="optimizer step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
