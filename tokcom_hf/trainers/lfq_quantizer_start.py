"""Pre-training of a quantizer as an autoencoder of image features, before joint training.

The loss of answers tells a new quantizer little about which features its 16 bits should keep, because its gradient passes a
whole language model. Reconstructing the features trains it directly, within seconds.
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
    """Trains a quantizer in place as an autoencoder of features, with AdamW and a rate that falls to zero.

    The error is measured after whitening, so that directions of small variance, such as the colour of a dot, count as much
    as those of large variance. Processes with the same features end with the same weights.

    Args:
        quantizer: with input_size = llm_hidden_size.
        features: `(images, n, input_size)`.
        steps: optimizer steps; 0 only matches mean and scale (`LFQQuantizer.match_features`).
        batch_size: images per step.
        learning_rate: the highest, after a short warm-up.
        entropy_weight: of the quantizer's entropy loss.
        seed: of the batches.

    Returns:
        The whitened squared error of the last tenth of the steps, as a share of the features' variance (NaN for none).
    """
    was_training = quantizer.training
    quantizer.match_features(features)
    mean, whitening = whitening_of(features.flatten(0, 1))
    whitening = whitening.to(features.device, torch.float32)
    shifted = (features.float() - mean.to(features.device, torch.float32)) @ whitening
    scale = shifted.square().mean()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup, generator, errors = max(1, steps // 20), torch.Generator().manual_seed(seed), []
    # In evaluation mode the quantizer sums nothing over ranks: each rank fits the same features alone.
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
