"""Pre-trains a quantizer as an autoencoder of image features, before joint training.

The loss of the answers tells a new quantizer little about which features its bits should keep, because the gradient passes a
whole language model. Reconstruction of the features trains the quantizer directly, within seconds.
"""

import math

import torch

from ..models.modeling_lfq_quantizer import LFQQuantizer, whitening_of


def fit_quantizer(
    quantizer: LFQQuantizer,
    features: torch.Tensor,
    steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    entropy_weight: float = 0.1,
    seed: int = 0,
) -> float:
    """Trains a quantizer in place as an autoencoder of features, with AdamW and a learning rate that falls to zero.

    The error is measured after whitening, so that directions of small variance, such as the colour of a dot, count as much
    as those of large variance. Processes with the same features end with the same weights.

    Args:
        quantizer: an `LFQQuantizer` whose `input_size` equals its `llm_hidden_size`.
        features: `(images, n, input_size)`.
        steps: optimizer steps; with 0 only `LFQQuantizer.match_features` runs.
        batch_size: images per step.
        learning_rate: highest learning rate, which a short warm-up reaches.
        entropy_weight: weight of the quantizer's entropy loss.
        seed: seed of the choice of batches.

    Returns:
        The whitened squared error in the last tenth of the steps, as a share of the features' variance; NaN for 0 steps.
    """
    was_training = quantizer.training
    quantizer.match_features(features)
    mean, whitening = whitening_of(features.flatten(0, 1))
    whitening = whitening.to(features.device, torch.float32)
    shifted = (features.float() - mean.to(features.device, torch.float32)) @ whitening
    scale = shifted.square().mean()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup, generator, errors = max(1, steps // 20), torch.Generator().manual_seed(seed), []
    # In evaluation mode the quantizer sums nothing over ranks; each rank fits the same features on its own.
    quantizer.eval()
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        chosen = torch.randint(len(features), (min(batch_size, len(features)),), generator=generator)
        chosen = chosen.to(features.device)
        output = quantizer(features[chosen])
        embeddings = (output.embeddings.float() - mean.to(features.device, torch.float32)) @ whitening
        error = (embeddings - shifted[chosen]).square().mean() / scale
        optimizer.zero_grad(set_to_none=True)
        (error + entropy_weight * output.entropy_loss).backward()
        torch.nn.utils.clip_grad_norm_(quantizer.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
    optimizer.zero_grad(set_to_none=True)
    quantizer.train(was_training)
    last = errors[-max(1, steps // 10) :] if errors else [math.nan]
    return sum(last) / len(last)
