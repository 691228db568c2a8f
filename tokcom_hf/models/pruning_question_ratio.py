"""How many vision tokens a question needs: as many as hold a given probability mass of softmax(scores)."""

import torch


def confident_count(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The number of best tokens that together reach a probability mass (nucleus, Holtzman et al. 2020).

    Peaked scores give a small number, flat scores a large one. The value is an integer; its gradient with respect to `mass`
    is that of the sum of sigmoid(logit(mass) - logit(mass of the better tokens)).

    Args:
        scores: `(batch, n)`, detached, so that the budget does not sharpen them.
        mass: scalar in (0, 1).

    Returns:
        `(batch,)` float, 1 to n.
    """
    probabilities = scores.detach().float().softmax(-1).sort(-1, descending=True).values
    # Probability mass of the better tokens, which rounding may take to 1.
    before = (probabilities.cumsum(-1) - probabilities).clamp(max=1 - 1e-6)
    hard = (before < mass).sum(-1).clamp(min=1).float()
    soft = torch.sigmoid(torch.logit(mass, eps=1e-6) - torch.logit(before, eps=1e-6)).sum(-1)
    return hard + (soft - soft.detach())


def within(count: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`count` clamped to [low, high] in value but not in gradient, so that values outside the range still learn."""
    return count.detach().clamp(low, high) + (count - count.detach())
