"""Initial values of `LFQQuantizer`: its first and its last layers fitted to the features."""

import torch
import torch.nn.functional as F

# Floor of the variances as a share of their mean: directions of much smaller variance count as noise and are not amplified.
WHITENING_FLOOR = 0.3


def whitening_of(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(width,)` and matrix `(width, width)` of a regularised whitening of vectors `(n, width)`, float64 on the CPU.

    A variance v along a principal axis becomes v / (v + floor), with floor = `WHITENING_FLOOR` · mean variance.
    """
    vectors = vectors.detach().cpu().double()
    mean = vectors.mean(0)
    values, directions = torch.linalg.eigh((vectors - mean).t().cov(correction=0))
    floor = WHITENING_FLOOR * values.mean().clamp_min(1e-12)
    return mean, directions * (values.clamp_min(0) + floor).rsqrt() @ directions.t()


@torch.no_grad()
def match_features(model, features: torch.Tensor, grid: tuple[int, int] | None) -> None:
    """Fits an `LFQQuantizer` to features `(batch, n, input_size)`; see `LFQQuantizer.match_features`."""
    flat = features.flatten(0, 1)
    first = model.input_proj if model.config.variant == "transformer" else model.to_bits
    mean, whitening = whitening_of(model.input_norm(flat.to(model.input_norm.weight.dtype)))
    weight = first.weight.cpu().double() @ whitening
    first.weight.copy_(weight)
    first.bias.copy_(first.bias.cpu().double() - weight @ mean)
    if model.config.input_size != model.config.llm_hidden_size:
        return
    model.embedding_scale.fill_(float(flat.float().std()))
    model.embedding_shift.copy_(flat.float().mean(0))
    bits = 2.0 * torch.cat([model.encode(part, grid) for part in features.split(64)]).flatten(0, 1) - 1
    hidden = F.gelu(model.from_bits[0](bits.to(model.from_bits[0].weight.dtype))).cpu().double()
    targets = ((flat.float() - model.embedding_shift) / model.embedding_scale).cpu().double()
    hidden_mean = hidden.mean(0)
    hidden = hidden - hidden_mean
    # Ridge regression: weight = (HᵀH + λI)⁻¹ HᵀY.
    gram = hidden.t() @ hidden / len(hidden)
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, hidden.t() @ targets / len(hidden)).t()
    model.from_bits[2].weight.copy_(weight)
    model.from_bits[2].bias.copy_(-weight @ hidden_mean)
