"""Generators side by side: perplexity at equal entropy, few steps against many, copying against held-out text."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from .text_brier import brier_lm_difference
from .text_protocol import Point

# Who judges, and the metric of its judgement.
SCORERS = (("train", "kn_perplexity"), ("held-out", "kn_perplexity_held_out"))


def ratio_at_equal_entropy(
    points: Sequence[Point], baseline: Point, tolerance: float = 0.1, key: str = "kn_perplexity_held_out"
) -> Point | None:
    """Best perplexity of `points` whose entropy is within `tolerance` nats of the baseline's, over the baseline's.

    Returns:
        the point with `ratio` added, or None where no point comes that near.
    """
    near = [point for point in points if abs(point["entropy"] - baseline["entropy"]) <= tolerance]
    if not near:
        return None
    best = min(near, key=lambda point: point[key])
    return {**best, "ratio": best[key] / baseline[key]}


def ratios_on_frontier(
    points: Sequence[Point], reference: Sequence[Point], key: str = "kn_perplexity_held_out"
) -> list[tuple[float, float]]:
    """Perplexity of each point over that of the reference curve at the same entropy, as (entropy, ratio).

    The reference's logarithm is interpolated between its points; points outside its entropies are left out.
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
    """TokCom's BrierLM minus that of each autoregressive baseline, on the same prefixes.

    Args:
        scores: name → Brier scores (prefixes, orders) from probabilities of each sampling seed, which are averaged; none for
            a sampler that does not know them. Names as in `compare`.

    Returns:
        baseline → difference and its bootstrap error.
    """
    means = {name: np.mean(runs, axis=0) for name, runs in scores.items() if runs}
    tokcom = next((means[name] for name in means if name.startswith("TokCom, ")), None)
    if tokcom is None:
        return {}
    baselines = [name for name in means if name.startswith("autoregressive")]
    return {name: brier_lm_difference(tokcom, means[name]) for name in baselines}


def compare(rows: dict, curves: dict, baselines: list[str]) -> dict[str, Any]:
    """TokCom against each baseline at equal entropy, few steps against many, copying against held-out text.

    Args:
        rows: name → metric → {"mean", "std"}, as `measure_sampler` returns them.
        curves: name → points, as `frontier` returns them; "TokCom" is compared with each name in `baselines`.

    Returns:
        the ratios by kind, and `lines`, the same to be read.
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
                text = f"TokCom's perplexity is {best['ratio']:.3g} x ({best['num_steps']} steps, {best['temperature']:g})"
            lines.append(f"  {label}, {scorer} scorer: {text}")
    for name, (scorer, key) in product(baselines, SCORERS):
        ratios = ratios_on_frontier(curves["TokCom"], curves[name], key)
        found["on_the_baselines_curve"][f"{name}, {scorer} scorer"] = ratios
        if ratios:
            where, lowest = min(ratios, key=lambda pair: pair[1])
            lines.append(
                f"  {name}, its curve interpolated, {scorer} scorer: TokCom's best point is {lowest:.3g} x "
                f"(entropy {where:.2f})"
            )
    for heat in sorted({point["temperature"] for point in curves["TokCom"]}):
        at = {p["num_steps"]: p["kn_perplexity_held_out"] for p in curves["TokCom"] if p["temperature"] == heat}
        if 16 in at and 50 in at:
            found["steps"][f"temperature {heat:g}"] = at[16] / at[50]
            lines.append(f"  16 steps / 50 steps at temperature {heat:g}: perplexity ratio {at[16] / at[50]:.3f}")
    few, many = ([p for p in curves["TokCom"] if p["num_steps"] == steps] for steps in (16, 50))
    for scorer, key in SCORERS:
        for entropy, ratio in ratios_on_frontier(few, many, key):
            found["steps_at_equal_entropy"][f"{entropy:.2f}, {scorer}"] = ratio
            lines.append(
                f"  16 steps / 50 steps at entropy {entropy:.2f}, {scorer} scorer: perplexity ratio {ratio:.3f}"
            )
    tokcom = next(name for name in rows if name.startswith("TokCom, ") and "one step" not in name)
    excess = rows[tokcom]["overlap_8"]["mean"] - rows["held-out text"]["overlap_8"]["mean"]
    found["overlap_8_above_held_out"] = excess
    lines.append(f"  8-gram overlap with train, above held-out text: {100 * excess:+.2f} points")
    return found | {"lines": lines}
