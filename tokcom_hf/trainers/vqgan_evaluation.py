"""Metrics of a VQGAN on held-out images, summed batch by batch and over ranks."""

import torch
from accelerate import Accelerator

from tokcom_hf.metrics.codebook import usage_of_counts, utilization_ceiling
from tokcom_hf.metrics.image import ms_ssim, psnr, ssim

# Code usage within one batch, averaged over batches.
BATCH_USAGE = ("active", "utilization", "entropy", "normalized_entropy")


class HeldOutSums:
    """Sums over this rank's batches of held-out images; `metrics` adds the other ranks'."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def counts(self) -> torch.Tensor | None:
        """How often this rank's images chose each code, `(codebook_size,)`; None before the first batch."""
        return self._sums.get("counts")

    def add(self, images: torch.Tensor, targets: torch.Tensor, codes: torch.Tensor, codebook_size: int) -> None:
        """Takes one batch: reconstructions and targets `(batch, channels, height, width)` in [-1, 1], and its codes."""
        counts = torch.bincount(codes.flatten(), minlength=codebook_size)
        values = {"psnr": psnr(images, targets), "ssim": ssim(images, targets), "ms_ssim": ms_ssim(images, targets)}
        sums = {name: value.double().sum() for name, value in values.items()}
        sums |= {"mse": (images - targets).double().square().flatten(1).mean(1).sum(), "counts": counts}
        sums["images"] = torch.tensor(len(images), device=images.device)
        batch = usage_of_counts(counts)
        sums |= {f"batch_{name}": torch.tensor(batch[name], device=images.device).double() for name in BATCH_USAGE}
        sums["batches"] = torch.ones((), device=images.device)
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Image metrics, code usage of the whole set and within batches; empty where no batch was added."""
        sums = {name: accelerator.reduce(value, "sum") for name, value in self._sums.items()}
        if not sums:
            return {}
        number = float(sums["images"])
        values = {name: float(sums[name]) / number for name in ("psnr", "ssim", "ms_ssim", "mse")}
        values |= usage_of_counts(sums["counts"])
        values["utilization_ceiling"] = utilization_ceiling(int(sums["counts"].sum()), sums["counts"].numel())
        return values | {f"batch_{name}": float(sums[f"batch_{name}"] / sums["batches"]) for name in BATCH_USAGE}
