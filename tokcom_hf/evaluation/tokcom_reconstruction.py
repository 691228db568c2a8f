"""Reconstruction metrics of a TokCom VAE: accuracy of tokens, chunks, sequences and rare tokens, and under latent noise."""

from typing import Any

import torch


def token_and_chunk_accuracy(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, chunk_size: int
) -> dict[str, float]:
    """Computes the share of correct tokens, and of chunks whose real tokens are all correct.

    Args:
        predicted, target: ids (rows, length), `length` a multiple of `chunk_size`.
        mask: (rows, length), 1 for real tokens, 0 for padding.
        chunk_size: tokens per chunk.

    Returns:
        `token_accuracy` and `chunk_accuracy`, in [0, 1].
    """
    mask = mask.bool()
    right = (predicted == target) | ~mask
    chunk_counts = mask.view(len(mask), -1, chunk_size).any(dim=-1)
    chunk_right = right.view(len(right), -1, chunk_size).all(dim=-1)
    return {
        "token_accuracy": ((predicted == target) & mask).sum().item() / max(1, int(mask.sum())),
        "chunk_accuracy": (chunk_right & chunk_counts).sum().item() / max(1, int(chunk_counts.sum())),
    }


@torch.no_grad()
def reconstruction_metrics(
    vae: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    noise_levels: tuple[float, ...] = (0.0, 0.5),
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """Measures a VAE's reconstruction of text with Gaussian noise on the latents.

    Args:
        vae: `TokComVAE`.
        input_ids, attention_mask: (rows, length) held-out text, 0 for padding.
        noise_levels: σ of the noise, in standard deviations of the latents.
        seed: seed of the noise.
        batch_size: rows per forward pass.

    Returns:
        `token_accuracy` and `chunk_accuracy` for σ = 0, `token_accuracy_sigma_0.5` and so on for other levels; `latent_std`
        (mean over dimensions) and `active_dimensions` (number of dimensions with a standard deviation above 0.1 of the
        largest).
    """
    vae.eval()
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(rows.to(device)).float().cpu() for rows in input_ids.split(batch_size)])
    real = attention_mask.view(len(attention_mask), -1, vae.config.chunk_size).any(dim=-1)
    std = latents[real].std(dim=0)
    metrics = {
        "latent_std": std.mean().item(),
        "active_dimensions": float((std > 0.1 * std.max()).sum()),
    }
    generator = torch.Generator().manual_seed(seed)
    for level in noise_levels:
        noisy = latents + level * std * torch.randn(latents.shape, generator=generator)
        ids = torch.cat([vae.decode(rows.to(device)).cpu() for rows in noisy.split(batch_size)])
        suffix = f"_sigma_{level:g}" if level else ""
        accuracies = token_and_chunk_accuracy(ids, input_ids, attention_mask, vae.config.chunk_size)
        metrics |= {f"{name}{suffix}": value for name, value in accuracies.items()}
    return metrics


def rare_token_accuracy(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, train_counts: torch.Tensor, at_most: int = 10
) -> dict[str, float]:
    """Measures the accuracy on tokens that occur at most `at_most` times in the training text, and their share.

    Args:
        predicted, target, mask: as for `token_and_chunk_accuracy`.
        train_counts: (vocab_size,) number of occurrences of each id in the training text.
        at_most: maximum number of occurrences of a rare token.

    Returns:
        `rare_token_accuracy` (NaN without rare tokens) and `rare_token_share`.
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
    """Computes all reconstruction metrics of a VAE on held-out rows; arguments as for the functions above.

    Returns:
        the metrics of `reconstruction_metrics` and `rare_token_accuracy`; `sequence_accuracy`, the share of rows without an
        error; `random_token_accuracy` and `random_chunk_accuracy`, on uniformly random ids, which language statistics cannot
        predict.
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


def _round_trip(vae: Any, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(vae.encode(rows.to(device))).cpu() for rows in ids.split(batch_size)])
