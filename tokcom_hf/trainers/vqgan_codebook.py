"""What the trainer does with a VQGAN's codebook: places its codes, computes its inputs ahead, changes its size."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.vqgan_quantizers import build_quantizer


@torch.no_grad()
def quantizer_inputs(model: VQGAN, pixel_values: torch.Tensor) -> torch.Tensor:
    """The vectors that the quantizer compares with its codes, `(positions, width)`, in float32."""
    quantizer: Any = model.quantizer
    features = model.features(pixel_values).float()
    with torch.autocast(features.device.type, enabled=False):
        return quantizer.prepare(quantizer.project_in(features).reshape(-1, quantizer.width))


@torch.no_grad()
def place_codes(model: VQGAN, dataset: Any, collate: Callable[[list], Any], number: int, seed: int) -> None:
    """Places the codes on features of training images.

    The images depend on `seed` alone, so that codes do not depend on rank and batch size.

    Args:
        model: a `VQGAN`; it stays in training or evaluation mode.
        dataset: training images, with a length and indices.
        collate: makes a batch with `pixel_values` of rows of the data set.
        number: number of images to use, at most all.
        seed: seed of the choice of images.
    """
    number = min(number, len(dataset))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number].tolist()
    training, parts = model.training, []
    model.eval()
    for start in range(0, number, 32):
        batch = collate([dataset[index] for index in chosen[start : start + 32]])
        parts.append(quantizer_inputs(model, batch["pixel_values"].to(model.device)))
    model.train(training)
    quantizer: Any = model.quantizer
    quantizer.initialize(torch.cat(parts))


def resize_codebooks(networks: Iterable[nn.Module | None], size: int) -> None:
    """Gives each network `size` codes: more by splitting codes; fewer by a new codebook, which is loaded afterwards."""
    for network in networks:
        if not isinstance(network, VQGAN) or network.config.codebook_size == size == network.quantizer.codebook_size:
            continue
        quantizer: Any = network.quantizer
        if size > quantizer.codebook_size:
            quantizer.expand(size)
            network.config.codebook_size = size
        else:
            network.config.codebook_size = size
            network.quantizer = build_quantizer(network.config, network.config.latent_channels).to(network.device)
