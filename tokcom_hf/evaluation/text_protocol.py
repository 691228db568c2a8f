"""The measuring protocol of generated text: seeds, prefixes, frontiers, and comparisons at equal entropy."""

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
    """Evenly spaced places of held-out text: prefixes (count, prefix_length) and what follows (count, target_length).

    Fewer than `count` come back where the text has fewer places.

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
    """What is drawn of a sampler for one seed.

    Args:
        count: rows from nothing.
        length: tokens of each.
        prefixes: ids (prefixes, prefix length) to continue, and what really follows (prefixes, target length), as
            `held_out_prefixes` gives them; None draws no continuations.
        draws: continuations of each prefix.
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
    """Metrics of rows drawn from nothing, and BrierLM on the plan's prefixes.

    Args:
        sampler: what writes the text.
        judge: knows the text of training and the held-out text.
        seeds: one draw of the whole plan each.
        plan: what is drawn for each seed.
        scores: where given, the Brier scores (prefixes, orders) of each seed are appended to it: from probabilities where
            the sampler knows them, otherwise from its draws.
        measure_more: further metrics of the rows (count, length), a judge's perplexity for example.

    Returns:
        metric -> {"mean", "std"} over the seeds (std 0 for one seed), with `tokens_per_second` and `distinct_rows` (how
        many of the rows differ) among the metrics; BrierLM and its parts a second time as `brier_lm_from_probabilities` ...
        where the sampler knows those; and `brier_lm_pooled`, from the draws of all seeds together, whose "std" is the
        bootstrap error over prefixes: with few draws a single seed's BrierLM is often 0.
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
            # Another seed than the rows', so that both are independent.
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
    """Mean and sample standard deviation of each metric over runs."""
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
    """Perplexity and entropy for each setting, for example {"num_steps": 8, "temperature": 0.5}.

    Returns:
        the settings, each with `kn_perplexity`, `kn_perplexity_held_out`, `entropy` and `tokens_per_second`.
    """
    points = []
    for setting in settings:
        measured = measure_sampler(make_sampler(**setting), judge, [seed], SamplingPlan(count, length))
        names = ("kn_perplexity", "kn_perplexity_held_out", "entropy", "tokens_per_second")
        points.append({**setting, **{name: measured[name]["mean"] for name in names}})
        if report is not None:
            report(points[-1])
    return points
