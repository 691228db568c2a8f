"""Measures perplexity and entropy of a TokCom model and its autoregressive baselines over their sampling settings."""

import json
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..data.text import TextRows
from ..metrics.text import TextJudge
from ..model_folders import load_pretrained
from .text_generation import CausalSampler, TokComSampler
from .text_protocol import frontier


def common_settings(run: Any) -> dict[str, Any]:
    """Returns the sampling settings that all TokCom rows and its frontier share."""
    return {"sampler": run.sampler, "block_size": run.block_size, "guidance_scale": run.guidance_scale,
            "best_of": run.best_of}  # fmt: skip


def baseline_name(folder: str) -> str:
    """Returns a name such as "autoregressive ar (equal compute)", from the folder and its `budget.json` if there is one."""
    file = Path(folder) / "budget.json"
    matched = json.loads(file.read_text(encoding="utf-8")).get("matched") if file.is_file() else None
    return f"autoregressive {Path(folder).name}" + (f" (equal {matched})" if matched else "")


def frontiers(run: Any, model, data: TextRows, judge: TextJudge, length: int) -> dict[str, list[dict[str, Any]]]:
    """Measures the frontiers: TokCom over steps × temperature, best_of and guidance; baselines over temperature.

    Args:
        run: arguments of recipes/evaluate_tokcom.py.
        model: a `TokComModel`.
        data: rows and tokenizer.
        judge: scorers of perplexity and entropy.
        length: tokens per row.

    Returns:
        "TokCom" and the baselines' names → points, see `text_protocol.frontier`.
    """
    report = lambda point: print("  " + "  ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)  # noqa: E731
    arguments = {
        "judge": judge,
        "count": run.frontier_samples,
        "length": length,
        "seed": run.seeds[0],
        "report": report,
    }
    common = common_settings(run)
    plain = {"best_of": run.best_of, "guidance_scale": run.guidance_scale}
    grid = [
        {"temperature": temperature, "num_steps": steps, **plain}
        for temperature, steps in product(run.frontier_temperatures, run.frontier_steps)
    ]
    varied: list[dict[str, Any]] = [{"best_of": count} for count in run.frontier_best_of]
    if model.config.context_dropout > 0:
        varied += [{"guidance_scale": scale} for scale in run.frontier_guidance]
    for temperature, other in product(run.frontier_temperatures, varied):
        grid.append({"temperature": temperature, "num_steps": run.num_steps, **plain, **other})
    # At temperature 0 all draws are equal, so `generate` refuses best_of above 1.
    grid = [point for point in grid if point["temperature"] > 0 or point["best_of"] == 1]
    print("\nfrontier of TokCom")
    curves = {"TokCom": frontier(lambda **point: TokComSampler(model, common | point), grid, **arguments)}
    for folder in run.baselines:
        baseline = load_pretrained(AutoModelForCausalLM, folder).eval().to(model.device)
        name = baseline_name(folder)
        print(f"frontier of {name}")
        points = [{"temperature": temperature} for temperature in run.baseline_temperatures]
        make = lambda net: lambda **point: CausalSampler(net, data.tokenizer.eos_token_id, **point)  # noqa: E731
        curves[name] = frontier(make(baseline), points, **arguments)
    return curves
