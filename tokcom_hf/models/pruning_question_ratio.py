"""How many vision tokens a question needs: as many as hold a share of the scores' probability."""

import torch


def confident_count(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The number of best tokens that together reach a probability.

    A question whose scores point at few tokens gets few, one whose scores are spread gets many (nucleus, Holtzman et al.
    2020, here over tokens to keep). The number is whole; its gradient by `mass` is that of the sum of
    sigmoid(logit(mass) - logit(probability before the token)).

    Args:
        scores: `(batch, n)`, read without gradient: they are not to grow sharper in order to save tokens.
        mass: scalar in (0, 1).

    Returns:
        `(batch,)` float, 1 to n.
    """
    probabilities = scores.detach().float().softmax(-1).sort(-1, descending=True).values
    # What the better tokens hold already; rounding may take it to 1.
    before = (probabilities.cumsum(-1) - probabilities).clamp(max=1 - 1e-6)
    hard = (before < mass).sum(-1).clamp(min=1).float()
    soft = torch.sigmoid(torch.logit(mass, eps=1e-6) - torch.logit(before, eps=1e-6)).sum(-1)
    return hard + (soft - soft.detach())


def within(count: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`count` clamped to [low, high] in value only, so that a budget moves those that lie outside, too."""
    return count.detach().clamp(low, high) + (count - count.detach())
