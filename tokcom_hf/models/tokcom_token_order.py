"""TokenOrder: earlier tokens of a chunk rise from the flow's noise before later ones.

    T = Σ_i C_i + rest                    covariance of the latents: C_i is what the token at place i adds to it
    S = T (Σ_i C_i / s_i + rest)⁻¹        scales what carries the token at place i by s_i
    s_i = exp(order · ((places − 1) / 2 − i))

In the space of S · latent, the noise is the same in all directions, so that a token of large scale is told from it at an
earlier time. Tokens that are decided one after the other fit each other better than tokens that are decided at once. An
encoder that keeps its tokens apart in the latent has C_i that hardly overlap. A direction that carries two tokens is scaled
by the harmonic mean of their scales, which is near the smaller one: the later token is then not seen as early as the first.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init


class TokenOrder(nn.Module):
    """The linear map from standardised latents to the flow's space, and its inverse, (latent, latent) each.

    The module has no `forward`, because accelerate's hooks would move the models around it.
    """

    scale: torch.Tensor
    inverse: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        self.order = config.token_order
        for name in ("scale", "inverse"):
            self.register_buffer(name, torch.eye(config.vae.latent_size))

    def reset(self) -> None:
        """Makes both maps the identity."""
        for buffer in (self.scale, self.inverse):
            init.copy_(buffer, torch.eye(len(buffer)))

    def apply_to(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents (…, latent) → the flow's space."""
        return latents @ self.scale.to(latents).T

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """The flow's space → standardised latents (…, latent)."""
        return latents @ self.inverse.to(latents).T

    @torch.no_grad()
    def fit(self, parts: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Sets and returns the map S of the covariances C_i, (places, latent, latent), and `rest`, (latent, latent)."""
        places = len(parts)
        scales = torch.exp(self.order * ((places - 1) / 2 - torch.arange(places, device=parts.device)))
        # A little more of the rest makes T invertible where a direction carries nothing.
        total = parts.sum(dim=0) + rest
        more = 1e-4 * total.diagonal().mean() * torch.eye(len(rest), device=rest.device)
        scaled = (parts / scales[:, None, None]).sum(dim=0) + rest + more
        self.inverse.copy_(torch.linalg.solve(total + more, scaled, left=False))
        self.scale.copy_(torch.linalg.inv(self.inverse.float()))
        return self.scale.float()


def without_order(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """The space of the flow of a `TokComModel` → standardised latents, in which all tokens count alike."""
    return latents if model.order is None else model.order.undo(latents)
