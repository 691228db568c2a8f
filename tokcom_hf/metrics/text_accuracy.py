"""Reconstruction of held-out text in detail: sequences, rare tokens, random chunks, and accuracy against latent noise."""

from typing import Any

import torch

from .reconstruction import reconstruction_metrics, token_and_chunk_accuracy


def rare_token_accuracy(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, train_counts: torch.Tensor, at_most: int = 10
) -> dict[str, float]:
    """Accuracy on tokens seen at most `at_most` times in training, and their share of the text.

    Args:
        predicted, target, mask: (rows, length).
        train_counts: (vocabulary,) occurrences of each id in the training text.
    """
    rare = (train_counts.to(target.device)[target] <= at_most) & mask.bool()
    count = int(rare.sum())
    right = int(((predicted == target) & rare).sum())
    return {
        "rare_token_accuracy": right / count if count else float("nan"),
        "rare_token_share": count / max(1, int(mask.sum())),
    }


@torch.no_grad()
def detailed_reconstruction(
    vae: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    train_counts: torch.Tensor,
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """Every reconstruction number of a VAE on held-out rows (rows, length).

    Returns `token_accuracy`, `chunk_accuracy` (and `..._sigma_0.5` per noise level, in standard deviations of the
    latents), `latent_std`, `active_dimensions`, `sequence_accuracy` (whole rows right), `rare_token_accuracy`,
    `rare_token_share` and `random_chunk_accuracy`, on chunks of uniformly random ids, where language does not help.
    """
    metrics = reconstruction_metrics(vae, input_ids, attention_mask, noise_levels, seed, batch_size)
    predicted = _round_trip(vae, input_ids, batch_size)
    wrong = (predicted != input_ids) & attention_mask.bool()
    metrics["sequence_accuracy"] = float((~wrong.any(dim=1)).float().mean())
    metrics |= rare_token_accuracy(predicted, input_ids, attention_mask, train_counts)
    generator = torch.Generator().manual_seed(seed)
    random_ids = torch.randint(vae.config.omni_token_id, input_ids.shape, generator=generator)
    accuracies = token_and_chunk_accuracy(
        _round_trip(vae, random_ids, batch_size), random_ids, torch.ones_like(random_ids), vae.config.chunk_size
    )
    return metrics | {f"random_{name}": value for name, value in accuracies.items()}


@torch.no_grad()
def denoise_reconstruct_accuracy(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    num_steps: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """Token accuracy after the whole flow from t = noise_level (0 noise, 1 clean): `reconstructed_accuracy_t_0.5` ..."""
    result = {}
    for level in noise_levels:
        generator = torch.Generator().manual_seed(seed)
        ids = model.denoise_reconstruct(input_ids.to(model.device), level, num_steps, generator=generator).cpu()
        accuracies = token_and_chunk_accuracy(ids, input_ids, attention_mask, model.config.vae.chunk_size)
        result[f"reconstructed_accuracy_t_{level:g}"] = accuracies["token_accuracy"]
    return result


def _round_trip(vae: Any, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(vae.encode(rows.to(device))).cpu() for rows in ids.split(batch_size)])
