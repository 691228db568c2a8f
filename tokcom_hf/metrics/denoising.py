"""How well a denoiser knows what a noisy or unfinished text says: accuracy against t, and the loss of the next token."""

from typing import Any

import torch

from .reconstruction import token_and_chunk_accuracy


@torch.no_grad()
def denoising_metrics(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    times: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9),
    seed: int = 0,
) -> dict[str, float]:
    """Token accuracy of one denoiser prediction from x_t, beside decoding x_t itself, for each t (0 noise, 1 clean).

    Returns `denoised_accuracy_t_0.1`, `direct_accuracy_t_0.1`, and so on; and `next_token_loss` of models that can draw
    token after token.
    """
    model.eval()
    device = next(model.parameters()).device
    ids, mask = input_ids.to(device), attention_mask.to(device)
    clean = model.standardize(model.encode(ids))
    chunk_mask = mask.view(len(mask), -1, model.config.vae.chunk_size).any(dim=-1).long()
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(clean.shape, generator=generator) * model.config.noise_std).to(clean)
    metrics = {}
    for t in times:
        x_t = (1 - t) * noise + t * clean
        steps = torch.full((len(ids),), t, device=device)
        predicted = model(x_t, steps, attention_mask=chunk_mask).clean_latents
        for name, latents in (("denoised", predicted), ("direct", x_t)):
            decoded = model.decode(model.unstandardize(latents))
            accuracy = token_and_chunk_accuracy(decoded, ids, mask, model.config.vae.chunk_size)["token_accuracy"]
            metrics[f"{name}_accuracy_t_{t:g}"] = accuracy
    if can_commit(model):
        metrics["next_token_loss"] = next_token_loss(model, ids, mask)
    return metrics


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


def can_commit(model: Any) -> bool:
    """Whether a `TokComModel` knows how likely each token is given those before it."""
    return model.config.token_time_std > 0 and model.config.denoiser.attention == "block_causal"


@torch.no_grad()
def next_token_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, temperature: float = 1.0
) -> float:
    """Mean cross-entropy in nats of each token given all before it in its row, the rows' first tokens left out.

    The sampler "commit" with block_size=1 draws from these very distributions, so this is minus the exact log-likelihood per
    token, to be compared with the loss of a causal language model on the same rows.

    Args:
        model: `TokComModel` with block-causal attention, trained with `token_time_std` > 0.
        input_ids, attention_mask: (rows, length), `length` a multiple of the chunk size; 0 = padding.
        temperature: `posterior_temperature` of the distributions.
    """
    chunk = model.config.vae.chunk_size
    clean = model.standardize(model.encode(input_ids))
    labels: Any = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, 0] = -100
    labels, places = labels.view(*clean.shape[:2], chunk), torch.arange(chunk, device=clean.device)
    real = attention_mask.view(*clean.shape[:2], chunk).any(dim=-1)
    total, count = 0.0, 0
    for place in range(chunk):
        times = (places < place).to(clean).expand(*clean.shape[:2], chunk)
        asked = (places == place).expand_as(times) & (labels >= 0)
        if not bool(asked.any()):
            continue
        # Nothing is seen of tokens at t = 0 but noise of mean zero; the mean itself keeps the measure free of chance.
        hidden = model(
            clean * model.per_entry(times), torch.full((1,), place / chunk, device=clean.device), token_times=times,
            context=clean, block_index=torch.arange(clean.shape[1], device=clean.device), attention_mask=real.long(),
            only_tokens=True, token_mask=asked,
        ).token_hidden  # fmt: skip
        number = len(hidden)
        unseen = torch.ones(number, dtype=torch.bool, device=hidden.device)
        total += float(model.token_cross_entropy(hidden / temperature, labels[asked], unseen)) * number
        count += number
    return total / max(1, count)
