"""What all quantizers share: projections, straight-through gradient, lookup and the count of codes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .vqgan_code_search import all_reduce, check_finite

# Decay of the reported usage of each code: about the last hundred optimizer steps.
USAGE_DECAY = 0.99


@dataclass
class QuantizerOutput(ModelOutput):
    """What a quantizer returns.

    embeddings: `(..., input_size)`, with a gradient to the features.
    codes: `(...)` int64.
    commitment_loss: mean squared distance between projected features and their codes (scalar).
    entropy_loss: (mean per-sample entropy − entropy of the mean assignment) / log K, in [−1, 1]; 0 where unused. Without the
        first part where `entropy_term` is `use`.
    diversity_loss: 1 − entropy of the mean assignment / log K, in [0, 1]; 0 where unused.
    """

    embeddings: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    diversity_loss: torch.Tensor | None = None


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 whatever the type of its weights."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight.float(), self.bias.float())


class Quantizer(nn.Module, ABC):
    """Projections in and out, straight-through gradient, and the count of codes; subclasses pick the codes.

    `enabled = False` lets features through unquantized (codes are still reported): the trainer's warm-up.
    `update_in_forward = True` applies codebook statistics in each training forward; a trainer that accumulates
    gradients sets it to False and calls `update()` once per optimizer step.
    """

    def __init__(self, config, input_size: int, width: int):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.width = width
        project = width != input_size
        self.project_in = Float32Linear(input_size, width) if project else nn.Identity()
        self.project_out = Float32Linear(width, input_size) if project else nn.Identity()
        # Whether the assignments' entropies are asked for at all: they cost a table of vectors × codes.
        self.measures_entropy = bool(config.entropy_weight or config.diversity_weight)
        self.enabled = True
        self.update_in_forward = True
        self.temperature = 0.0
        self.last_count: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None
        # Exponential average of each code's share of the vectors, with the weight that corrects its start.
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("usage_weight", torch.zeros(()))

    def reset_buffers(self) -> None:
        """Refills buffers after construction on the meta device."""
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
        """See `QuantizerOutput`; differentiable in `vectors`. Zero for quantizers whose codes need no such term."""
        return vectors.new_zeros(())

    def entropy_losses(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`entropy_loss` and `diversity_loss` of `QuantizerOutput`."""
        return self.entropy_loss(vectors), vectors.new_zeros(())

    def look_ahead(self, micro_batches: list[torch.Tensor]) -> None:
        """Sees all micro-batches of the coming optimizer step, before the first of them is trained on.

        The entropy of the mean assignment is no mean over micro-batches: with this, `entropy_loss` takes it over all
        of them, as one large batch would. Each entry holds prepared vectors `(n, width)`. Every rank must call it.
        """

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen code vectors with a gradient to `vectors`: straight-through."""
        return vectors + (chosen - vectors).detach()

    def nearest(self, vectors: torch.Tensor) -> torch.LongTensor:
        """Vectors `(n, width)` → the codes `(n,)` of inference; subclasses that draw codes in training override it."""
        return self.assign(vectors)[0]

    # ---------------------------------------------------------------- interface
    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> torch.LongTensor:
        """Features `(..., input_size)` → codes `(...)` of inference, also in training mode; nothing is recorded.

        Raises:
            ValueError: features that are NaN or infinite have no nearest code.
        """
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.prepare(self.project_in(features.float()).reshape(-1, self.width))
            check_finite(vectors, "Encoding")
            return self.nearest(vectors).reshape(features.shape[:-1])

    def forward(self, features: torch.Tensor, learns: bool = True) -> QuantizerOutput:
        """Quantizes `(..., input_size)`; in training the statistics are recorded unless `learns` is False."""
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
                # One NaN would stay in the moving averages of the codebook for ever.
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
            ValueError: a code outside [0, codebook_size).
        """
        if codes.dtype.is_floating_point or codes.dtype in (torch.bool, torch.complex64):
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
        """Remembers one training forward until the next `update()`."""
        count = torch.bincount(codes, minlength=self.codebook_size).float()
        self._pending = count if self._pending is None else self._pending + count

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Applies what was recorded since the last call, summed over ranks; every rank must call it."""
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
