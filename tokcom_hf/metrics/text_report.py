"""The tables of the text evaluation, as they are printed."""

from typing import Any

COLUMNS = {
    "brier_lm": "BrierLM", "brier_lm_from_probabilities": "from p", "brier_1": "Brier-1",
    "kn_perplexity": "KN train", "kn_perplexity_held_out": "KN held-out",
    "entropy": "entropy", "distinct_2": "dist-2", "self_bleu": "selfBLEU", "js_1": "JS-1", "js_2": "JS-2", "auc": "AUC",
    "overlap_8": "8-gram", "longest_match": "longest", "tokens_per_second": "tok/s",
}  # fmt: skip


def print_accuracies(results: dict[str, Any]) -> None:
    """Reconstruction, denoising, spread of the latents and length of the sampling path, of `evaluation.json`."""
    print("\nheld-out reconstruction")
    for name, value in results["reconstruction"].items():
        print(f"  {name:28} {value:.5g}")
    print("held-out denoising: noisy latents decoded, after one prediction, after the whole flow (reconstructed)")
    for name, value in results["denoising"].items():
        print(f"  {name:28} {value:.4f}")
    std = results["latent_std_per_dimension"]
    print(f"standard deviation per latent dimension: {std[0]:.3f} ... {std[len(std) // 2]:.3f} ... {std[-1]:.3f}")
    norms = "  ".join(
        f"{t:.2f}:{norm:.3f}" for t, norm in zip(results["sampling_path"]["t"], results["sampling_path"]["rms"])
    )
    print(f"root mean square of x along the sampling path (t:rms)  {norms}\n")


def print_row(name: str, row: dict[str, dict[str, float]], header: bool = False) -> None:
    """One generator: metric → {"mean", "std"}; `header` prints the titles of the columns above it."""
    if header:
        print(f"{'mean ± std over seeds':40}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    cells = [f"{row[key]['mean']:.4g} ± {row[key]['std']:.2g}" if key in row else "-" for key in COLUMNS]
    print(f"{name:40}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
