"""Lookup-free quantization (2310.05737), with the exact entropy of codes whose bits are independent."""

import math

import torch

from .shared_bit_entropy import factorised_entropy
from .vqgan_code_search import gather_rows, rank_of_process, world_size
from .vqgan_quantizer_base import Quantizer


class LFQQuantizerHead(Quantizer):
    """Lookup-free quantization: code Σ bit_i · 2^i with bit_i = [vector_i > 0], and code vectors of ±1."""

    def __init__(self, config, input_size: int):
        super().__init__(config, input_size, int(math.log2(config.codebook_size)))
        self.entropy_temperature = config.entropy_temperature
        self._step_logits: list[torch.Tensor] = []
        self._micro_batch = 0

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits = vectors.detach() > 0
        places = torch.arange(self.width, device=vectors.device)
        return (bits.long() << places).sum(1), bits.to(vectors.dtype) * 2 - 1

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.width, device=codes.device)
        return ((codes[..., None] >> places) & 1).float() * 2 - 1

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        logits = self.bit_logits(vectors)
        if not (self.training and self._step_logits):
            # Across ranks in training only: a rank that evaluates alone would wait for the other ranks forever.
            per_sample, batch = factorised_entropy(logits, across_ranks=self.training)
            return (per_sample - batch) / math.log(self.codebook_size)
        per_sample, _ = factorised_entropy(logits)
        parts = [part.chunk(world_size()) for part in self._step_logits]
        mine, rank = self._micro_batch, rank_of_process()
        self._micro_batch += 1
        # Only this part has a gradient; the rest of the global batch enters as a constant.
        rows = [
            logits[: len(part)] if (position, owner) == (mine, rank) else part
            for position, owners in enumerate(parts)
            for owner, part in enumerate(owners)
        ]
        _, batch = factorised_entropy(torch.cat(rows))
        # The gradient is scaled by the number of parts, because the trainer averages over parts and each has only its share.
        batch = batch.detach() + len(rows) * (batch - batch.detach())
        return (per_sample - batch) / math.log(self.codebook_size)

    def bit_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Log odds 4x/T of each bit, `(n, bits)`: softmax(−‖x − e‖²/T) over codes e of ±1 is a product over bits."""
        return 4 * vectors / self.entropy_temperature

    @torch.no_grad()
    def look_ahead(self, micro_batches: list[torch.Tensor]) -> None:
        self._step_logits = [gather_rows(self.bit_logits(vectors)) for vectors in micro_batches]
        self._micro_batch = 0

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Counts codes; this quantizer has no codebook to move."""
        self._step_logits = []
        super().update(allow_reset)
