"""Protocol of the text evaluation: held-out prefixes, sampling seeds, and frontiers of perplexity and entropy."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.text import TextJudge
from ..metrics.text_brier import brier_scores, brier_scores_from_log_probs, brier_summary
from .text_generation import Sampler, tokens_behind_prefix

Point = dict[str, Any]


def held_out_prefixes(
    tokens: np.ndarray, count: int, prefix_length: int, target_length: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts evenly spaced prefixes and their true continuations out of held-out text.

    Args:
        tokens: (tokens,) ids of the held-out text.
        count: number of prefixes; a short text gives fewer.
        prefix_length, target_length: tokens of a prefix and of a continuation.

    Returns:
        prefixes (count, prefix_length) and continuations (count, target_length).

    Raises:
        ValueError: the text is shorter than one prefix and its continuation.
    """
    places = len(tokens) - prefix_length - target_length + 1
    if places < 1:
        raise ValueError(
            f"The held-out text has {len(tokens)} tokens; a prefix of {prefix_length} and its continuation need "
            f"{prefix_length + target_length}. Give more held-out text or a shorter --prefix_length."
        )
    starts = np.unique(np.linspace(0, places - 1, min(count, places)).astype(np.int64))
    windows = starts[:, None] + np.arange(prefix_length + target_length)
    return tokens[windows[:, :prefix_length]], tokens[windows[:, prefix_length:]]


@dataclass(frozen=True)
class SamplingPlan:
    """What a sampler draws for one seed.

    Args:
        count: number of rows drawn without a prompt.
        length: tokens per row.
        prefixes: prefixes and their true continuations, from `held_out_prefixes`; None draws no continuations.
        draws: number of continuations per prefix.
    """

    count: int
    length: int
    prefixes: tuple[np.ndarray, np.ndarray] | None = None
    draws: int = 2


def measure_sampler(
    sampler: Sampler,
    judge: TextJudge,
    seeds: Iterable[int],
    plan: SamplingPlan,
    scores: list[np.ndarray] | None = None,
    measure_more: Callable[[np.ndarray], dict[str, float]] | None = None,
) -> dict[str, dict[str, float]]:
    """Measures rows drawn without a prompt, and BrierLM on the plan's prefixes.

    Args:
        sampler: the generator to measure.
        judge: metrics, fitted on training and held-out text.
        seeds: seeds; the whole plan is drawn once for each.
        plan: what is drawn for each seed.
        scores: list to which the Brier scores (prefixes, orders) of each seed are appended, from probabilities if the
            sampler
            knows them, else from draws.
        measure_more: function that returns further metrics of the rows (count, length), for example a judge's perplexity.

    Returns:
        metric -> {"mean", "std"} over the seeds (std is 0 for one seed): the metrics of `TextJudge.measure`,
        `tokens_per_second`, `distinct_rows` (number of different rows), and BrierLM and its parts. If the sampler knows
        probabilities, BrierLM and its parts from these are included as `brier_lm_from_probabilities` ... `brier_lm_pooled`
        uses the scores of all seeds together, because a single seed with few draws often has a BrierLM of 0; its "std" is
        the bootstrap error over prefixes.
    """
    runs = []
    scores = [] if scores is None else scores
    for seed in seeds:
        started = time.perf_counter()
        rows = sampler.rows(plan.count, plan.length, seed)
        seconds = time.perf_counter() - started
        run = judge.measure(rows) | {"tokens_per_second": rows.size / seconds}
        run["distinct_rows"] = float(len(np.unique(rows, axis=0)))
        run |= {} if measure_more is None else measure_more(rows)
        if plan.prefixes is not None:
            given, targets = plan.prefixes
            # A seed other than that of the rows, so that both draws are independent.
            wanted = tokens_behind_prefix(sampler, targets.shape[1])
            continued, log_probs = sampler.scored_continuations(given, targets, plan.draws, wanted, seed + 10_000)
            per_prefix = brier_scores(continued, targets)
            run |= brier_summary(per_prefix)
            if log_probs is not None:
                per_prefix = brier_scores_from_log_probs(log_probs[:, 1:], log_probs[:, 0])
                known = brier_summary(per_prefix)
                run |= {f"{name}_from_probabilities": value for name, value in known.items() if name != "prefixes"}
            scores.append(per_prefix)
        runs.append(run)
    result = summarize(runs)
    if scores:
        pooled = brier_summary(np.mean(scores[-len(runs) :], axis=0))
        result["brier_lm_pooled"] = {"mean": pooled["brier_lm"], "std": pooled["brier_lm_error"]}
    return result


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the mean and sample standard deviation of each metric over runs, as {"mean", "std"}."""
    return {
        name: {
            "mean": float(np.mean([run[name] for run in runs])),
            "std": float(np.std([run[name] for run in runs], ddof=1)) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
    }


def frontier(
    make_sampler: Callable[..., Sampler],
    settings: Iterable[Point],
    judge: TextJudge,
    count: int,
    length: int,
    seed: int = 0,
    report: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Measures perplexity and entropy for each sampling setting.

    Args:
        make_sampler: function from a setting's entries to a sampler.
        settings: sampling settings, for example {"num_steps": 8, "temperature": 0.5}.
        judge: metrics, fitted on training and held-out text.
        count, length: number of rows per setting, and tokens per row.
        seed: seed of the rows.
        report: called with each point when it is measured.

    Returns:
        the settings, each with `kn_perplexity`, `kn_perplexity_held_out`, `entropy` and `tokens_per_second` added.
    """
    points = []
    for setting in settings:
        measured = measure_sampler(make_sampler(**setting), judge, [seed], SamplingPlan(count, length))
        names = ("kn_perplexity", "kn_perplexity_held_out", "entropy", "tokens_per_second")
        points.append({**setting, **{name: measured[name]["mean"] for name in names}})
        if report is not None:
            report(points[-1])
    return points
