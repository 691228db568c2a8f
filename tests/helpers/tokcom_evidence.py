"""The evidence of a `TokenPosterior` as densities of torch, and a text before three blocks."""

import torch

from tests.helpers.tokcom_tools import seeded

TEXT = torch.randint(0, 50, (3, 5), generator=seeded(11))


@torch.no_grad()
def text_before(model) -> torch.Tensor:
    """The context's states after five tokens, before each of three blocks."""
    return model.context(TEXT)[:, -1]


def evidence(model, x, t) -> torch.Tensor:
    """Log density of the chunks (chunks, latent) at time t for each token at each place, (chunks · 4, vocab)."""
    parts, found = model.posterior, []
    embedding = model.vae.embed_tokens.weight
    for chunk in x:
        for place in range(4):
            rotation = parts.rotation[place]
            noise = (1 - t) ** 2 * model.config.noise_std**2 * torch.eye(16)
            covariance = t**2 * rotation @ parts.variance[place].diag() @ rotation.T + noise
            added = (embedding - parts.mean) @ (rotation @ parts.directions[place]).T
            density = torch.distributions.MultivariateNormal(t * (parts.center + added), covariance)
            found.append(density.log_prob(chunk))
    found = torch.stack(found)
    found[:, 50] = -torch.inf
    return found
