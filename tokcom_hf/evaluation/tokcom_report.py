"""The text table of a TokCom model: metrics of its text and of controls that lack one part of the model."""

from typing import Any

import numpy as np
import torch

from ..metrics.text import TextJudge, unigram_entropy
from .text_generation import HeadSampler, ShuffledChunkSampler, TokComSampler

# Column -> metric of `TextJudge`.
COLUMNS = {
    "perplexity (train)": "kn_perplexity", "perplexity (held-out)": "kn_perplexity_held_out", "entropy": "entropy",
    "distinct texts": "distinct_texts",
}  # fmt: skip


def measure_text(
    model: Any, train: Any, held_out: Any, rows: int = 16, seed: int = 0, num_steps: int | None = None
) -> dict[str, dict[str, float]]:
    """Measures rows of text that the model and its controls generate without a prompt, with 5-gram Kneser–Ney scorers.

    Args:
        model: `TokComModel`.
        train, held_out: data sets with `input_ids` (length,).
        rows: number of rows per sampler.
        seed: seed of the samplers.
        num_steps: steps of the flow; None means the model's.

    Returns:
        name -> `kn_perplexity` (scorer fitted on training text), `kn_perplexity_held_out` (scorer fitted on held-out text),
        `entropy` (nats) and `distinct_texts` (number of different rows). Names are "held-out text", "TokCom", "TokCom
        without noise" (x_0 = 0, so all rows are the same text), "heads alone" (the context's heads draw a chunk's tokens
        independently; only with a context) and "shuffled chunks".
    """
    ids = [np.stack([np.asarray(row["input_ids"]) for row in part]) for part in (train, held_out)]
    length, chunk = ids[0].shape[1], model.config.vae.chunk_size
    judge = TextJudge(ids[0].reshape(-1), ids[1], model.config.vae.vocab_size)
    samplers: dict[str, Any] = {
        "TokCom": TokComSampler(model, {"num_steps": num_steps}),
        "TokCom without noise": TokComSampler(model, {"num_steps": num_steps, "temperature": 0.0}),
        "shuffled chunks": ShuffledChunkSampler(ids[0].reshape(-1), chunk),
    }
    if model.context is not None:
        samplers["heads alone"] = HeadSampler(model)
    drawn = {"held-out text": judge.held_out_rows[:rows]}
    with torch.no_grad():
        drawn |= {name: sampler.rows(rows, length, seed) for name, sampler in samplers.items()}
    return {
        name: {
            "kn_perplexity": judge.train_scorer.perplexity(list(text)),
            "kn_perplexity_held_out": judge.held_out_scorer.perplexity(list(text)),
            "entropy": unigram_entropy(list(text)),
            "distinct_texts": float(len({row.tobytes() for row in np.ascontiguousarray(text)})),
        }
        for name, text in drawn.items()
    }


def print_report(results: dict[str, Any], prompt: str) -> None:
    """Prints the losses, the VAE's accuracy under noise, the table of `measure_text` and the samples from `results`."""
    for name, stage in (
        ("stage 1 (VAE)", "vae"),
        ("stage 2 (flow)", "denoiser"),
        ("stage 3 (few steps)", "distilled"),
    ):
        part = results.get(stage, {})
        if "first_loss" in part:
            print(
                f"\n{name}: training loss {part['first_loss']:.3f} -> {part['last_loss']:.3f} in {part['steps']} steps"
            )
    flow = results.get("denoiser", {})
    if "eval_next_token_loss" in flow:
        print(f"  held-out next-token loss of the context's heads: {flow['eval_next_token_loss']:.3f} nats per token")
    vae = results.get("vae", {})
    if "token_accuracy" in vae:
        print("\nheld-out accuracy of the VAE with latent noise (sigma in standard deviations of the latents)")
        for sigma in (0, 0.3, 0.5, 0.7, 1.0):
            suffix = f"_sigma_{sigma:g}" if sigma else ""
            token, chunk = vae[f"token_accuracy{suffix}"], vae[f"chunk_accuracy{suffix}"]
            print(f"  sigma {sigma:<4g} token {token:.4%}   chunk {chunk:.4%}")
        print(f"  untrained  token {vae['untrained_token_accuracy']:.4%}")
    print(f"\n{'unprompted text':<23}" + "".join(f"{column:>24}" for column in COLUMNS))
    for name, measured in results["text"].items():
        values = (measured[key] for key in COLUMNS.values())
        print(f"  {name:<21}" + "".join(f"{value:>24.2f}" for value in values))
    generated, continued = results["samples"]["generated"], results["samples"]["conditional"]
    print(f"\ngenerated without a prompt:\n  {generated!r}\n\ncontinuing {prompt!r}:\n  {continued!r}\n")
