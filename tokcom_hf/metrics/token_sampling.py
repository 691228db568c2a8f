"""Samples token ids from logits."""

import torch


def sample_tokens(
    logits: torch.Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws ids (...) from softmax(logits / temperature), logits (..., vocab); temperature 0 takes the argmax.

    Inverse transform sampling needs one random number per token. `torch.multinomial` draws one per token and vocabulary
    entry, which took a quarter of generation time. Random numbers are drawn on the CPU, so that a seed gives the same
    numbers on every device.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    flat = logits.float().flatten(0, -2) / temperature
    sums = flat.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.rand(len(flat), 1, dtype=torch.float64, generator=generator).to(sums.device) * sums[:, -1:]
    ids = torch.searchsorted(sums, drawn, right=True).clamp(max=logits.shape[-1] - 1)
    return ids.view(logits.shape[:-1])
