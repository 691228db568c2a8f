"""Prints the tables of the text evaluation."""

from typing import Any

COLUMNS = {
    "brier_lm_pooled": "BrierLM", "brier_1": "Brier-1", "brier_2": "Brier-2", "brier_3": "Brier-3", "brier_4": "Brier-4",
    "kn_perplexity": "KN train", "kn_perplexity_held_out": "KN held-out", "entropy": "entropy",
    "judge_perplexity": "judge", "distinct_rows": "distinct rows", "distinct_2": "dist-2", "self_bleu": "selfBLEU",
    "js_1": "JS-1", "js_2": "JS-2", "auc": "AUC", "overlap_8": "8-gram", "longest_match": "longest",
    "tokens_per_second": "tok/s",
}  # fmt: skip


def print_accuracies(results: dict[str, Any]) -> None:
    """Prints reconstruction, denoising, latent standard deviations and sampling path of `evaluation.json`."""
    print("\nheld-out reconstruction")
    for name, value in results["reconstruction"].items():
        print(f"  {name:32} {value:.5g}")
    print(
        "held-out denoising: direct = noisy latents decoded, denoised = one prediction, reconstructed = the whole flow"
    )
    for name, value in results["denoising"].items():
        print(f"  {name:32} {value:.4f}")
    std, path = results["latent_std_per_dimension"], results["sampling_path"]
    print(f"standard deviation per latent dimension: {std[0]:.3f} ... {std[len(std) // 2]:.3f} ... {std[-1]:.3f}")
    norms = "  ".join(f"{t:.2f}:{norm:.3f}" for t, norm in zip(path["t"], path["rms"]))
    print(f"root mean square of x along the sampling path (t:rms)  {norms}")
    print(
        f"mean squared distance of sampled latents to the encoding of their decoded text: {path['text_distance']:.3f}\n"
    )


def print_row(name: str, row: dict[str, dict[str, float]], header: bool = False) -> None:
    """Prints one generator's row of the table.

    Brier-n is the one from probabilities, if the row has it. BrierLM is that of all seeds together, ± its bootstrap error.

    Args:
        name: name of the generator.
        row: metric → {"mean", "std"}.
        header: print the column titles first.
    """
    if header:
        print(f"{'mean ± std over seeds':40}" + "".join(f"{title:>17}" for title in COLUMNS.values()))
    cells = []
    for key in COLUMNS:
        found = row.get(f"{key}_from_probabilities", row.get(key))
        cells.append("-" if found is None else f"{_short(found['mean'], 4)} ± {_short(found['std'], 2)}")
    print(f"{name:40}" + "".join(f"{cell:>17}" for cell in cells), flush=True)


def _short(value: float, digits: int) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:.{digits}g}" if abs(value) >= 0.01 else f"{value:.1e}"
