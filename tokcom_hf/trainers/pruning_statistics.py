"""Statistics of token pruning for logs and evaluations: soft masks of vision tokens, losses, discriminator outputs."""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .pruning_losses import mask_statistics


def vision_masks(model, output, input_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields for each pruned layer its number, the soft masks `(tokens,)` of vision tokens and how many stay `(batch,)`.

    Text and padding are left out, because they are never pruned and their masks are always 1.

    Args:
        model: the `PrunedVLM`.
        output: its output for a pass in soft mode.
        input_ids: `(batch, length)` of that pass.
    """
    vision = input_ids == model.family.image_token_id
    for place, mask in enumerate(output.soft_masks or ()):
        layer = model.layer_pruner.config.layers[place]
        index = output.kept_index[layer]
        pruned = vision.gather(1, index.clamp(min=0)) & (index >= 0)
        yield layer, mask[pruned], (output.keep_masks[place] & pruned).sum(-1).float()


def step_scalars(
    model, output, losses: dict[str, torch.Tensor], input_ids: torch.Tensor
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yields what the log of a training step holds: pairs of a prefix and scalars by name.

    Args:
        model: the `PrunedVLM`.
        output: its output for the step's pass in soft mode.
        losses: losses of the step, by name.
        input_ids: `(batch, length)`.
    """
    merger = {name: value for name, value in losses.items() if name.startswith("merge_")}
    others = {name: value for name, value in losses.items() if name not in merger}
    if output.merge_kept_tokens is not None:
        merger["kept_tokens"] = output.merge_kept_tokens
    yield "token_merger", merger
    yield "layer_pruners", others
    counts = [(index >= 0).sum(-1).float().mean() for index in output.kept_index]
    yield "pruning", {f"tokens_layer_{number}": count for number, count in enumerate(counts)}
    for layer, mask, kept in vision_masks(model, output, input_ids):
        yield "pruning", {f"kept_from_layer_{layer}": kept.mean()}
        if len(mask):
            yield f"mask_layer_{layer}", mask_statistics(mask)


def discriminator_losses(real: torch.Tensor, fake: torch.Tensor) -> dict[str, torch.Tensor]:
    """`real_loss` −log D(real), `fake_loss` −log(1 − D(fake)), and mean D of both; D = σ(logit), logits `(batch,)`."""
    return {
        "real_loss": F.softplus(-real).mean(),
        "fake_loss": F.softplus(fake).mean(),
        "prob_real": real.detach().sigmoid().mean(),
        "prob_fake": fake.detach().sigmoid().mean(),
    }


class PruningStatistics:
    """Collects batches of an evaluation in soft mode; `metrics` summarises them."""

    def __init__(self):
        self._masks: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._verdicts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._losses: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def add(self, model, output, inputs, losses: dict[str, torch.Tensor], verdicts=None) -> None:
        """Takes one batch.

        Args:
            losses: means over the batch, by name.
            verdicts: the discriminator's logits for the unpruned and for the pruned states, both `(batch,)`.
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
            total = torch.stack([rows * value for rows, value in parts]).sum()
            values[name] = total / sum(rows for rows, _ in parts)
        if self._verdicts:
            real, fake = torch.cat(self._verdicts["real"]), torch.cat(self._verdicts["fake"])
            verdict = discriminator_losses(real, fake)
            values |= {name if "loss" in name else f"disc_{name}": value for name, value in verdict.items()}
        return {name: float(value) for name, value in values.items()}
