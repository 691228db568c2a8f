"""Figure of joint LFQ training (needs matplotlib, extra `plots`)."""

from pathlib import Path
from typing import Any

from ..metrics.lfq import ALIVE
from .figures import drawn_or_not, pyplot, save


@drawn_or_not
def plot_joint_training(history: list[dict], report: dict[str, Any], path: str | Path) -> None:
    """Plots generation loss and KL divergence over the optimizer steps, and the mean and flip rate of every bit.

    Args:
        history: a trainer's log history.
        report: the final evaluation of `JointLFQTrainer`.
        path: PNG file to write.
    """
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(13, 3.4))
    _curve(left, history, "joint/generation_loss", "training")
    _curve(left, history, "eval_generation_loss", "held-out", marker="o")
    if "generation_chance" in report:
        left.axhline(
            report["generation_chance"], color="black", linestyle="--", linewidth=0.8, label="uniform over all codes"
        )
    left.set(title="generation loss of image tokens", xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
    for name, label in (("quantized_kl", "quantized features"), ("continuous_kl", "continuous features")):
        _curve(middle, history, f"joint/{name}", label)
        _curve(middle, history, f"eval_{name}", f"{label}, held-out", marker="o")
    middle.set(
        title="KL divergence of answers from the teacher",
        xlabel="optimizer step",
        ylabel="nats per token",
        yscale="log",
    )
    bits = range(len(report["bit_mean"]))
    right.bar(bits, report["bit_mean"], label="share of ones")
    right.plot(bits, report["flip_rate"], "k.", label="flip rate")
    for bound in ALIVE:
        right.axhline(bound, color="black", linestyle="--", linewidth=0.8)
    right.set(title="held-out bits", xlabel="bit", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, middle, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, path)


def _curve(axis, history: list[dict], name: str, label: str, **style) -> None:
    points = [(row["step"], row[name]) for row in history if row.get(name)]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)
