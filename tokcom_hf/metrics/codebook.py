"""Codebook usage metrics, counted from code indices."""

import math

import torch


def code_counts(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Counts how often each code occurs, `(codebook_size,)` int64.

    Raises:
        TypeError: codes are not integers (one-hot or soft assignments are not codes).
        ValueError: there are no codes, or a code is outside [0, codebook_size).
    """
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise TypeError(f"Codes must be integer indices, got {codes.dtype}.")
    if codes.numel() == 0:
        raise ValueError("There are no codes to count.")
    if int(codes.min()) < 0 or int(codes.max()) >= codebook_size:
        raise ValueError(f"Codes must be in [0, {codebook_size}), got {int(codes.min())} … {int(codes.max())}.")
    return torch.bincount(codes.flatten().long(), minlength=codebook_size)


def usage_of_counts(counts: torch.Tensor) -> dict[str, float]:
    """Returns the metrics of `codebook_usage` from counts or shares `(codebook_size,)`."""
    size = counts.numel()
    share = counts.double() / counts.double().sum().clamp_min(1e-300)
    entropy = float(torch.special.entr(share).sum())
    active = int((counts > 0).sum())
    return {
        "active": active,
        "utilization": active / size,
        "entropy": entropy,
        "normalized_entropy": entropy / math.log(size) if size > 1 else 1.0,
        "perplexity": math.exp(entropy),
    }


def codebook_usage(codes: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """Measures the usage of a codebook by integer codes of any shape.

    Returns:
        active (number of codes that occur), utilization (active / K), entropy (nats), normalized_entropy
        (entropy / log K) and perplexity (exp entropy).
    """
    return usage_of_counts(code_counts(codes, codebook_size))


def utilization_ceiling(number: int, codebook_size: int) -> float:
    """Expected utilization, 1 − (1 − 1/K)^N, of N = `number` uniformly drawn codes: the most to expect of a batch of N."""
    return -math.expm1(number * math.log1p(-1 / codebook_size)) if codebook_size > 1 else 1.0


class CodebookMonitor:
    """Tracks codebook usage during training: of the last batch, of a window of batches, and as a moving average.

    Args:
        codebook_size: number of codes, K.
        window: number of updates in the window.
        decay: decay of the exponential moving average of counts, in (0, 1).
    """

    def __init__(self, codebook_size: int, window: int = 100, decay: float = 0.99):
        self.codebook_size, self.window, self.decay = codebook_size, window, decay
        self.recent: list[torch.Tensor] = []
        self.total = torch.zeros(codebook_size)
        self.average = torch.zeros(codebook_size)

    def update(self, counts: torch.Tensor) -> None:
        """Adds the counts `(codebook_size,)` of one optimizer step."""
        counts = counts.detach().float().cpu()
        self.recent = [*self.recent, counts][-self.window :]
        self.total = self.total + counts
        self.average = self.decay * self.average + (1 - self.decay) * counts

    def resize(self, codebook_size: int) -> None:
        """Changes the number of codes; new codes have a count of 0."""
        if codebook_size != self.codebook_size:
            self.recent = [_resized(counts, codebook_size) for counts in self.recent]
            self.total, self.average = _resized(self.total, codebook_size), _resized(self.average, codebook_size)
            self.codebook_size = codebook_size

    def report(self) -> dict[str, float]:
        """Returns scalars for the log; an empty dictionary before the first update.

        `batch_*` are usage metrics of the last optimizer step, with `batch_utilization_ceiling`; `window_*` of the last
        `window` steps; `cumulative_*` of the moving average.
        """
        if not self.recent:
            return {}
        last = self.recent[-1]
        batch, window = usage_of_counts(last), usage_of_counts(torch.stack(self.recent).sum(0))
        return {
            "batch_active": batch["active"],
            "batch_utilization": batch["utilization"],
            "batch_utilization_ceiling": utilization_ceiling(int(last.sum()), self.codebook_size),
            "batch_entropy": batch["entropy"],
            "batch_normalized_entropy": batch["normalized_entropy"],
            "window_utilization": window["utilization"],
            "window_normalized_entropy": window["normalized_entropy"],
            **self.cumulative(),
        }

    def cumulative(self) -> dict[str, float]:
        """Returns the metrics of the moving average (part of `report`); zeros before the first update."""
        # A code counts as active while its average is above that of a single hit 3 / (1 − decay) steps ago.
        floor = (1 - self.decay) * self.decay ** (3 / (1 - self.decay))
        average = usage_of_counts(torch.where(self.average > floor, self.average, 0.0))
        return {f"cumulative_{name}": average[name] for name in ("active", "entropy", "normalized_entropy")}

    def state_dict(self) -> dict:
        return {"recent": self.recent, "total": self.total, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.recent, self.total, self.average = state["recent"], state["total"], state["average"]
        self.codebook_size = self.total.numel()


def _resized(counts: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(counts, (0, size - counts.numel()))
