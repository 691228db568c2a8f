"""Metrics of a VQGAN on held-out images, summed batch by batch over the images of all ranks."""

import torch
from accelerate import Accelerator

from tokcom_hf.metrics.codebook import usage_of_counts, utilization_ceiling
from tokcom_hf.metrics.image import ms_ssim, psnr, ssim

# Code usage within one batch of all ranks, averaged over batches.
BATCH_USAGE = ("active", "utilization", "entropy", "normalized_entropy")


class HeldOutSums:
    """Sums over batches of held-out images, the same on every rank.

    Images that the data loader repeats to give every rank a full batch count once.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def counts(self) -> torch.Tensor | None:
        """How often the images chose each code, `(codebook_size,)`; None before the first batch."""
        return self._sums.get("counts")

    def add(
        self,
        accelerator: Accelerator,
        images: torch.Tensor,
        targets: torch.Tensor,
        codes: torch.Tensor,
        codebook_size: int,
    ) -> None:
        """Takes one batch of each rank; every rank must call it.

        Args:
            accelerator: accelerator of the trainer.
            images, targets: reconstructions and targets `(batch, channels, height, width)` in [-1, 1].
            codes: `(batch, ...)`.
            codebook_size: number of codes.
        """
        values = {"psnr": psnr(images, targets), "ssim": ssim(images, targets), "ms_ssim": ms_ssim(images, targets)}
        values["mse"] = (images - targets).double().square().flatten(1).mean(1)
        names, columns = zip(*values.items())
        table = torch.stack([column.double() for column in columns], dim=1)
        table, codes = accelerator.gather_for_metrics((table.contiguous(), codes.flatten(1).contiguous()))
        sums = dict(zip(names, table.sum(0)))
        counts = torch.bincount(codes.flatten(), minlength=codebook_size)
        sums |= {"counts": counts, "images": torch.tensor(len(table), device=images.device)}
        batch = usage_of_counts(counts)
        sums |= {f"batch_{name}": torch.tensor(batch[name], device=images.device).double() for name in BATCH_USAGE}
        sums["batches"] = torch.ones((), device=images.device)
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self) -> dict[str, float]:
        """Image metrics, and code usage in the whole set and within batches; empty if no batch was added."""
        sums = self._sums
        if not sums:
            return {}
        number = float(sums["images"])
        values = {name: float(sums[name]) / number for name in ("psnr", "ssim", "ms_ssim", "mse")}
        values |= usage_of_counts(sums["counts"])
        values["utilization_ceiling"] = utilization_ceiling(int(sums["counts"].sum()), sums["counts"].numel())
        return values | {f"batch_{name}": float(sums[f"batch_{name}"] / sums["batches"]) for name in BATCH_USAGE}
