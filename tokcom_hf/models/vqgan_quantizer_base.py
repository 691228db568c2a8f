"""Quantizer: projections, straight-through gradient, lookup and usage counts, which all quantizers share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .vqgan_code_search import all_reduce, check_finite

# Decay of the moving average of each code's usage, which covers about the last hundred optimizer steps.
USAGE_DECAY = 0.99


@dataclass
class QuantizerOutput(ModelOutput):
    """Output of a quantizer.

    embeddings: `(..., input_size)`, with a gradient to the features.
    codes: `(...)` int64.
    commitment_loss: mean squared distance between projected features and their codes (scalar).
    entropy_loss: (mean entropy of each vector's assignment − entropy of the mean assignment) / log K, in [−1, 1]; without
        the first part if `entropy_term` is `use`; 0 if entropy_weight and diversity_weight are both 0.
    diversity_loss: 1 − entropy of the mean assignment / log K, in [0, 1]; 0 if both weights are 0.
    """

    embeddings: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    diversity_loss: torch.Tensor | None = None


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32, whatever the dtype of its weights."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight.float(), self.bias.float())


class Quantizer(nn.Module, ABC):
    """Base class of quantizers; subclasses choose the codes.

    enabled: False returns the features unquantized, beside their codes; the trainer sets it for `autoencoder_steps`.
    update_in_forward: True moves the codebook in each training forward. A trainer that accumulates gradients sets it to
        False and calls `update()` once per optimizer step.
    """

    usage: torch.Tensor
    usage_weight: torch.Tensor

    def __init__(self, config, input_size: int, width: int):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.width = width
        project = width != input_size
        self.project_in = Float32Linear(input_size, width) if project else nn.Identity()
        self.project_out = Float32Linear(width, input_size) if project else nn.Identity()
        # Entropies cost a table of vectors × codes, so they are computed only for a loss that has them.
        self.measures_entropy = bool(config.entropy_weight or config.diversity_weight)
        self.enabled = True
        self.update_in_forward = True
        self.temperature = 0.0
        self.last_count: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None
        # Moving average of each code's share of the vectors, and the weight that corrects for its start at zero.
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("usage_weight", torch.zeros(()))

    def reset_buffers(self) -> None:
        """Fills the buffers, which construction on the meta device leaves empty."""
        self.usage.zero_()
        self.usage_weight.zero_()

    # ---------------------------------------------------------------- what subclasses define
    @abstractmethod
    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `(n, width)` → codes `(n,)` and code vectors `(n, width)` without gradient."""

    @abstractmethod
    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(...)` → code vectors `(..., width)`."""

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        """Maps projected features into the space where codes live."""
        return vectors

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        """`entropy_loss` of `QuantizerOutput`, differentiable in `vectors`; zero unless a subclass overrides this."""
        return vectors.new_zeros(())

    def entropy_losses(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`entropy_loss` and `diversity_loss` of `QuantizerOutput`."""
        return self.entropy_loss(vectors), vectors.new_zeros(())

    def look_ahead(self, micro_batches: list[torch.Tensor]) -> None:
        """Scans the micro-batches of the next optimizer step, prepared vectors `(n, width)` each; every rank must call it.

        The entropy of a mean is not the mean of entropies. After this call, `entropy_loss` is that of all micro-batches
        together, as in one large batch.
        """

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x + sg(e − x): the chosen code vectors e, with the straight-through gradient to the vectors x."""
        return vectors + (chosen - vectors).detach()

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `(n, width)` → codes `(n,)` of inference; overridden by quantizers that draw codes in training."""
        return self.assign(vectors)[0]

    # ---------------------------------------------------------------- interface
    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., input_size)` → codes `(...)` of inference, even in training mode; nothing is recorded.

        Raises:
            ValueError: features are NaN or infinite.
        """
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.prepare(self.project_in(features.float()).reshape(-1, self.width))
            check_finite(vectors, "Encoding")
            return self.nearest(vectors).reshape(features.shape[:-1])

    def forward(self, features: torch.Tensor, learns: bool = True) -> QuantizerOutput:
        """Quantizes features `(..., input_size)`; training records statistics unless `learns` is False."""
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.prepare(self.project_in(features.float()).reshape(-1, self.width))
            codes, chosen = self.assign(vectors)
            commitment = F.mse_loss(vectors, chosen.detach())
            entropy = diversity = vectors.new_zeros(())
            if self.enabled and self.measures_entropy and (self.training or not torch.is_grad_enabled()):
                entropy, diversity = self.entropy_losses(vectors)
            connected = self.connect(vectors, chosen) if self.enabled else vectors
            if not self.enabled:
                commitment = commitment * 0
            elif self.training and learns:
                # A NaN would never leave the moving averages again.
                check_finite(vectors.detach(), "Training of the codebook")
                self.record(codes, vectors.detach(), chosen)
                if self.update_in_forward:
                    self.update()
            embeddings = self.project_out(connected)
        return QuantizerOutput(
            embeddings=embeddings.reshape(features.shape).to(features.dtype),
            codes=codes.reshape(features.shape[:-1]),
            commitment_loss=commitment,
            entropy_loss=entropy,
            diversity_loss=diversity,
        )

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(...)` → embeddings `(..., input_size)`.

        Raises:
            TypeError: codes are not integers.
            ValueError: a code is outside [0, codebook_size).
        """
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise TypeError(f"Codes must be integers, got {codes.dtype}.")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"Codes must be in [0, {self.codebook_size}), got {int(codes.min())} … {int(codes.max())}."
            )
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(self.vectors_of(codes.long()))

    # ---------------------------------------------------------------- statistics
    @torch.no_grad()
    def record(self, codes: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        """Adds the statistics of one training forward to those that the next `update()` applies."""
        count = torch.bincount(codes, minlength=self.codebook_size).float()
        self._pending = count if self._pending is None else self._pending + count

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Applies what all ranks have recorded since the last call; every rank must call it."""
        if self._pending is None:
            return
        self.last_count = all_reduce(self._pending)
        self._pending = None
        share = self.last_count / self.last_count.sum().clamp_min(1)
        self.usage.lerp_(share, 1 - USAGE_DECAY)
        self.usage_weight.lerp_(torch.ones_like(self.usage_weight), 1 - USAGE_DECAY)

    def usage_share(self) -> torch.Tensor:
        """Bias-corrected moving average of each code's share of the vectors, `(codebook_size,)`."""
        return self.usage / self.usage_weight.clamp_min(1e-12)
