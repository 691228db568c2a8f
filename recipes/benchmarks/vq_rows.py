"""The rows of `vq_quantizers.py`: one small network with the quantizer of each, and the settings they were given."""

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
# Number of codes wanted → the levels of FSQ's paper (2309.15505), whose product is near it; fours and eights elsewhere.
FSQ_LEVELS = {256: [8, 6, 5], 1024: [8, 5, 5, 5], 4096: [7, 5, 5, 5, 5], 16384: [8, 8, 8, 6, 5]}
# Codes have log2 of the codebook size dimensions, but for those of `WIDE`.
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
# Up to this many codes are as wide as the features, without a map around the codebook, and every step sees each of them
# often enough to balance their use. Behind a map to 10 dimensions the network reproduces nothing but mean colours for
# longer: on tuning photos, K=1024, seeds 0 to 2, 23.9, 21.2 and 22.3 dB at an entropy of 0.982 with it, 24.0, 23.8 and
# 23.7 dB at 0.974 without, 24.0 and 23.8 dB (seeds 0, 1) at 0.982 balanced. On procedural tuning images (seed 0) 21.44 dB
# at 0.993 with the map, 21.32 dB at 0.987 without. An orthogonal map came to 21.1 dB on seed 1 of the photos, the
# rotation estimator to 22.3, and quantizing after 10 % or 50 % of the steps to 22.1 and 21.1. For K=64 (seed 0; photos,
# procedural): 22.2 dB at 0.981 and 20.06 at 0.989 narrow, 21.5 dB at 0.993 balanced, 23.1 dB at 0.992 and 19.96 at 0.998
# wide too, 23.2 dB at 0.992 and 20.01 at 0.998 with a shorter stretch without quantization on top. Without any such
# stretch one seed of three loses 1.5 dB on photos.
WIDE_CODES = 1024
WIDE = {"codebook_dim": NETWORK["latent_channels"], "balance_rate": 0.05}
# Share of the steps without quantization before `ours` places its codes by k-means.
WARMUP = 0.3
WARMUP_FEW_CODES = 0.15
FEW_CODES = 256
# Documented: the commitment grows over five epochs, codes are reset once an epoch. These runs last about one epoch, so
# codes are reset more often here. Not documented: how long codes are drawn at the temperature, what distances are divided
# by (√width instead of their mean costs 3 dB, because the entropy term then inflates the features), and the temperature
# of the entropy term (sharper assignments than 25 cost more).
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
    """VQ-VAE's own codebook: U(±1/K), straight-through, codebook loss and 0.25 commitment, no remedy."""

    def __init__(self, width: int, codebook_size: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, width).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.enabled, self.update_in_forward = True, True

    def forward(self, features: torch.Tensor) -> QuantizerOutput:
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
