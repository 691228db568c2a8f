"""The rows of `vq_quantizers.py`: one small network, with the quantizer and the settings of each row."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tokcom_hf.models.configuration_vqgan import READ_BY, VQGANConfig, default_fsq_levels
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.vqgan_quantizers import QuantizerOutput

METHODS = [
    "naive",
    "library_default",
    "library_threshold",
    "library_cosine16",
    "library_kmeans",
    "library_fsq",
    "ours",
    "ours_cosine",
    "ours_no_warmup",
    "ours_fsq",
    "ours_fsq_paper_levels",
    "ours_lfq",
    "paper_no_remedies",
    "paper",
]
NETWORK = {
    "image_size": 32,
    "downsample_factor": 4,
    "patch_size": 2,
    "base_channels": 32,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "mid_attention": False,
    "latent_channels": 64,
    "l1_weight": 1.0,
    "mse_weight": 1.0,
}
# Wanted number of codes → levels in FSQ's paper (arXiv 2309.15505), whose product is close to it; other sizes take
# `default_fsq_levels`.
FSQ_LEVELS = {256: [8, 6, 5], 1024: [8, 5, 5, 5], 4096: [7, 5, 5, 5, 5], 16384: [8, 8, 8, 6, 5]}
# A code has log2(codebook size) dimensions, unless `WIDE` gives another width.
OURS = {
    "codebook_similarity": "euclidean",
    "commitment_weight": 0.25,
    "entropy_weight": 0.0,
    "temperature": 0.0,
    "codebook_init": "kmeans",
    "ema_decay": 0.97,
    "dead_code_threshold": 0.4,
    "dead_code_unit": "mean",
    "reset_interval": 1,
}
# Codebooks of at most this many codes use `WIDE`: codes as wide as the features, without a projection around the
# codebook, and balanced use, since every step sees each of so few codes often enough. Reason: behind a projection to 10
# dimensions, the network reproduces only mean colours for longer. PSNR and normalised entropy on the tuning images:
#   photos, K=1024, seeds 0 to 2: projected 23.9, 21.2, 22.3 dB at 0.982; wide 24.0, 23.8, 23.7 dB at 0.974; wide and
#     balanced (seeds 0, 1) 24.0, 23.8 dB at 0.982. Projected, seed 1, with an orthogonal projection 21.1 dB, with the
#     rotation estimator 22.3 dB, with quantization after 10 % or 50 % of the steps 22.1 or 21.1 dB.
#   procedural images, K=1024, seed 0: projected 21.44 dB at 0.993; wide 21.32 dB at 0.987.
#   photos / procedural images, K=64, seed 0: projected 22.2 dB at 0.981 / 20.06 dB at 0.989; balanced 21.5 dB at 0.993;
#     wide and balanced 23.1 dB at 0.992 / 19.96 dB at 0.998, with a shorter warm-up 23.2 dB at 0.992 / 20.01 dB at 0.998.
# Without any warm-up one seed of three loses 1.5 dB on photos.
WIDE_CODES = 1024
WIDE = {"codebook_dim": NETWORK["latent_channels"], "balance_rate": 0.05}
# Share of the steps that `ours` trains without quantization, before k-means initialises its codebook.
WARMUP = 0.3
WARMUP_FEW_CODES = 0.15
FEW_CODES = 256
# The documents say that the commitment weight grows over five epochs and that codes are reset once an epoch; these runs last
# about one epoch, so codes are reset more often here. The documents do not say for how long codes are sampled at the
# temperature, by what distances are divided (their mean here; √width costs 3 dB, because the entropy term then inflates the
# features), or which temperature the entropy term has (25 here; lower ones cost more).
PAPER = {"codebook_dim": 64, "temperature_scale": "mean", "entropy_temperature": 25.0}
PAPER_COMMITMENT_EPOCHS = 5
PAPER_RESET_INTERVAL = 30
PAPER_ANNEAL = 0.01
NO_REMEDIES = {"entropy_weight": 0.0, "temperature": 0.0, "reset_fraction": 0.0}


class Library(nn.Module):
    """A quantizer of vector-quantize-pytorch behind this package's interface."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer
        self.enabled, self.update_in_forward = True, True

    def forward(self, features: torch.Tensor) -> QuantizerOutput:
        """Quantizes features (batch, height, width, channels)."""
        shape = features.shape
        embeddings, codes, *loss = self.quantizer(features.reshape(shape[0], -1, shape[-1]))
        # The library's loss already holds its commitment weight of 1.
        loss = loss[0].sum() if loss else features.new_zeros(())
        return QuantizerOutput(
            embeddings=embeddings.reshape(shape),
            codes=codes.reshape(shape[:-1]).long(),
            commitment_loss=loss,
            entropy_loss=features.new_zeros(()),
        )


class Naive(nn.Module):
    """The codebook of VQ-VAE: U(±1/K) initialisation, straight-through, codebook loss + 0.25 commitment, no remedy."""

    def __init__(self, width: int, codebook_size: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, width).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.enabled, self.update_in_forward = True, True

    def forward(self, features: torch.Tensor) -> QuantizerOutput:
        """Quantizes features (batch, height, width, channels)."""
        flat = features.reshape(-1, features.shape[-1])
        codes = torch.cdist(flat.detach(), self.codebook.detach()).argmin(1)
        chosen = self.codebook[codes]
        loss = F.mse_loss(chosen, flat.detach()) + 0.25 * F.mse_loss(flat, chosen.detach())
        return QuantizerOutput(
            embeddings=(flat + (chosen - flat).detach()).reshape(features.shape),
            codes=codes.reshape(features.shape[:-1]),
            commitment_loss=loss,
            entropy_loss=features.new_zeros(()),
        )


def build(method: str, size: int) -> VQGAN:
    """The common network with the quantizer of one row."""
    ours = {"codebook_dim": size.bit_length() - 1} | OURS | (WIDE if size <= WIDE_CODES else {})
    own = {"ours": ours, "ours_cosine": ours | {"codebook_similarity": "cosine"}, "paper": PAPER}
    shared = {name: value for name, value in ours.items() if name not in READ_BY and name != "codebook_dim"}
    own["ours_fsq"] = shared | {"quantizer": "fsq"}
    own["ours_fsq_paper_levels"] = shared | {"quantizer": "fsq", "fsq_levels": FSQ_LEVELS.get(size)}
    own["ours_lfq"] = shared | {"quantizer": "lfq", "entropy_weight": 0.3, "entropy_temperature": 0.3}
    own["ours_no_warmup"] = ours
    own["paper_no_remedies"] = PAPER | NO_REMEDIES
    if method in own:
        codes = math.prod(own[method].get("fsq_levels") or [size])
        return VQGAN(VQGANConfig(**NETWORK, codebook_size=codes, **own[method]))
    external = {"commitment_weight": 1.0, "entropy_weight": 0.0, "temperature": 0.0}
    model = VQGAN(VQGANConfig(**NETWORK, codebook_size=size, **external))
    width = NETWORK["latent_channels"]
    if method == "naive":
        model.quantizer = Naive(width, size)
        return model
    from vector_quantize_pytorch import FSQ, VectorQuantize

    extra = {
        "library_default": {},
        "library_threshold": {"threshold_ema_dead_code": 2},
        "library_cosine16": {"codebook_dim": 16, "use_cosine_sim": True, "threshold_ema_dead_code": 2},
        "library_kmeans": {"kmeans_init": True},
    }
    if method == "library_fsq":
        model.quantizer = Library(FSQ(levels=default_fsq_levels(size), dim=width))
    elif method in extra:
        model.quantizer = Library(VectorQuantize(dim=width, codebook_size=size, **extra[method]))
    else:
        raise ValueError(f"Unknown method {method!r}; choose from {', '.join(METHODS)}.")
    return model
