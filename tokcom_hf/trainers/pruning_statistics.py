"""What an evaluation of token pruning reports beside answers: masks of vision tokens, the discriminator's verdicts."""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .pruning_losses import mask_statistics


def vision_masks(model, output, input_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Per pruned layer its number, the soft masks of the vision tokens `(tokens,)` and how many are kept `(batch,)`.

    Text and padding, whose masks are 1 because nobody prunes them, are left out.

    Args:
        model: the `PrunedVLM`.
        output: of its pass in soft mode.
        input_ids: of that pass, `(batch, length)`.
    """
    vision = input_ids == model.adapter.image_token_id
    for place, mask in enumerate(output.soft_masks or ()):
        layer = model.layer_pruner.config.layers[place]
        index = output.kept_index[layer]
        pruned = vision.gather(1, index.clamp(min=0)) & (index >= 0)
        yield layer, mask[pruned], (output.keep_masks[place] & pruned).sum(-1).float()


def discriminator_losses(real: torch.Tensor, fake: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropies against 1 and 0, and mean probabilities of "unpruned"; from logits `(batch,)`."""
    return {
        "real_loss": F.softplus(-real).mean(),
        "fake_loss": F.softplus(fake).mean(),
        "prob_real": real.detach().sigmoid().mean(),
        "prob_fake": fake.detach().sigmoid().mean(),
    }


class PruningStatistics:
    """Collects soft passes over evaluation rows; `metrics` sums them up."""

    def __init__(self):
        self._masks: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._verdicts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._losses: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def add(self, model, output, inputs, losses: dict[str, torch.Tensor], verdicts=None) -> None:
        """Takes one batch.

        Args:
            losses: scalars of the batch by name.
            verdicts: the discriminator's logits of the unpruned and of the pruned states, both `(batch,)`.
        """
        ids = inputs["input_ids"]
        for layer, mask, _ in vision_masks(model, output, ids):
            self._masks[layer].append(mask.detach().float().cpu())
        for name, value in losses.items():
            self._losses[name].append((len(ids), value.detach().float().cpu()))
        for name, logits in zip(("real", "fake"), verdicts or ()):
            self._verdicts[name].append(logits.detach().float().cpu())

    def metrics(self) -> dict[str, float]:
        """`mask_{mean,std,min,max}` over all layers and per layer, `disc_prob_{real,fake}`, the losses."""
        layers = {layer: torch.cat(masks) for layer, masks in self._masks.items()}
        values: dict[str, torch.Tensor] = {}
        if layers:
            values |= {f"mask_{k}": v for k, v in mask_statistics(torch.cat(list(layers.values()))).items()}
        for layer, mask in layers.items():
            values |= {f"mask_layer_{layer}_{k}": v for k, v in mask_statistics(mask).items()}
        for name, parts in self._losses.items():
            values[name] = sum(rows * value for rows, value in parts) / sum(rows for rows, _ in parts)
        if self._verdicts:
            real, fake = torch.cat(self._verdicts["real"]), torch.cat(self._verdicts["fake"])
            verdict = discriminator_losses(real, fake)
            values |= {name if "loss" in name else f"disc_{name}": value for name, value in verdict.items()}
        return {name: float(value) for name, value in values.items()}
