"""Compares generators: perplexity at equal entropy, few steps against many, and overlap with the training text."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from ..metrics.text_brier import brier_lm_difference
from ..plots.text import setting_name
from .text_protocol import Point

# Text that a scorer was fitted on, and the metric with its perplexity.
SCORERS = (("train", "kn_perplexity"), ("held-out", "kn_perplexity_held_out"))
# Numbers of steps whose perplexities are compared.
FEW, MANY = 8, 32


def ratio_at_equal_entropy(
    points: Sequence[Point], baseline: Point, tolerance: float = 0.1, key: str = "kn_perplexity_held_out"
) -> Point | None:
    """Compares the best perplexity of `points` with the baseline's at equal entropy.

    Args:
        points: points of a frontier, see `text_protocol.frontier`.
        baseline: point to compare with.
        tolerance: maximum difference of entropy, in nats.
        key: the perplexity to compare.

    Returns:
        the best point within the tolerance, with `ratio` (its perplexity divided by the baseline's) added; None if no point
        is within the tolerance.
    """
    near = [point for point in points if abs(point["entropy"] - baseline["entropy"]) <= tolerance]
    if not near:
        return None
    best = min(near, key=lambda point: point[key])
    return {**best, "ratio": best[key] / baseline[key]}


def ratios_on_frontier(
    points: Sequence[Point], reference: Sequence[Point], key: str = "kn_perplexity_held_out"
) -> list[tuple[float, float]]:
    """Divides each point's perplexity by that of the reference curve at the same entropy; returns (entropy, ratio) pairs.

    The log-perplexity of the reference is interpolated linearly between its points. Points outside the reference's range of
    entropies are left out.
    """
    curve = sorted(reference, key=lambda point: point["entropy"])
    entropies = [point["entropy"] for point in curve]
    logarithms = np.log([point[key] for point in curve])
    return [
        (point["entropy"], float(point[key] / np.exp(np.interp(point["entropy"], entropies, logarithms))))
        for point in points
        if len(curve) > 1 and entropies[0] <= point["entropy"] <= entropies[-1]
    ]


def brier_lm_differences(scores: dict[str, list[np.ndarray]]) -> dict[str, dict[str, float]]:
    """Compares TokCom's BrierLM and Brier-n with its heads alone and with each autoregressive baseline.

    Args:
        scores: name → Brier scores (prefixes, orders) of each sampling seed, on the same prefixes; they are averaged over
            seeds. Names are those of `compare`, and "heads alone".

    Returns:
        name of the other generator → `text_brier.brier_lm_difference` of TokCom minus that generator.
    """
    means = {name: np.mean(runs, axis=0) for name, runs in scores.items() if runs}
    tokcom = _own_row(means)
    if tokcom is None:
        return {}
    others = [name for name in means if name == "heads alone" or name.startswith("autoregressive")]
    return {name: brier_lm_difference(means[tokcom], means[name]) for name in others}


def difference_line(name: str, found: dict[str, float]) -> str:
    """Formats one result of `brier_lm_differences` as a line of text."""
    orders = "  ".join(
        f"Brier-{n} {found[f'brier_{n}_difference']:+.2f} [{found[f'brier_{n}_low']:+.2f}, {found[f'brier_{n}_high']:+.2f}]"
        for n in range(1, 5)
    )
    return f"TokCom minus {name}: BrierLM {found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]  {orders}"


def _own_row(rows: dict) -> str | None:
    """Returns the name of TokCom's main row, such as "TokCom, 8 steps", or None; its variants have other suffixes."""
    names = (name for name in rows if name.startswith("TokCom, ") and name.endswith(" steps"))
    return next(names, None)


def compare(rows: dict, curves: dict, baselines: list[str]) -> dict[str, Any]:
    """Compares TokCom with each baseline at equal entropy, few steps with many, and its overlap with that of held-out text.

    Args:
        rows: name → metric → {"mean", "std"}, results of `measure_sampler`.
        curves: name → points, results of `frontier`.
        baselines: names in `curves` that "TokCom" is compared with.

    Returns:
        the ratios by kind of comparison, and `lines`, the same results as text.
    """
    found: dict[str, Any] = {
        "equal_entropy": {}, "on_the_baselines_curve": {}, "steps": {}, "steps_at_equal_entropy": {},
    }  # fmt: skip
    lines = ["\ncomparisons"]
    for name, target in ((key, point) for key in baselines for point in curves[key]):
        label = f"{name} at temperature {target['temperature']:g} (entropy {target['entropy']:.2f})"
        found["equal_entropy"][label] = {}
        for scorer, key in SCORERS:
            best = found["equal_entropy"][label][scorer] = ratio_at_equal_entropy(curves["TokCom"], target, key=key)
            text = "no TokCom point within 0.1 nats of its entropy"
            if best is not None:
                text = f"TokCom's perplexity is {best['ratio']:.3g} x ({setting_name(best)})"
            lines.append(f"  {label}, {scorer} scorer: {text}")
    for name, (scorer, key) in product(baselines, SCORERS):
        ratios = ratios_on_frontier(curves["TokCom"], curves[name], key)
        found["on_the_baselines_curve"][f"{name}, {scorer} scorer"] = ratios
        if ratios:
            where, lowest = min(ratios, key=lambda pair: pair[1])
            lines.append(
                f"  {name}, interpolated curve, {scorer} scorer: TokCom's best perplexity is {lowest:.3g} x "
                f"(entropy {where:.2f})"
            )
    plain = [p for p in curves["TokCom"] if p.get("best_of", 1) == 1 and p.get("guidance_scale", 1.0) == 1.0]
    for temperature in sorted({point["temperature"] for point in plain}):
        at = {p["num_steps"]: p["kn_perplexity_held_out"] for p in plain if p["temperature"] == temperature}
        if FEW in at and MANY in at:
            found["steps"][f"temperature {temperature:g}"] = at[FEW] / at[MANY]
            lines.append(
                f"  {FEW} steps / {MANY} steps at temperature {temperature:g}: perplexity ratio {at[FEW] / at[MANY]:.3f}"
            )
    few, many = ([p for p in plain if p["num_steps"] == steps] for steps in (FEW, MANY))
    for scorer, key in SCORERS:
        for entropy, ratio in ratios_on_frontier(few, many, key):
            found["steps_at_equal_entropy"][f"{entropy:.2f}, {scorer}"] = ratio
            lines.append(
                f"  {FEW} steps / {MANY} steps at entropy {entropy:.2f}, {scorer} scorer: perplexity ratio {ratio:.3f}"
            )
    tokcom = _own_row(rows)
    excess = rows[tokcom]["overlap_8"]["mean"] - rows["held-out text"]["overlap_8"]["mean"]
    found["overlap_8_above_held_out"] = excess
    lines.append(f"  8-gram overlap with the training text, minus that of held-out text: {100 * excess:+.2f} points")
    return found | {"lines": lines}
