"""Finite scalar quantization (2309.15505): x → round(bound(x)), one of L_i levels in dimension i."""

import torch

from .vqgan_quantizer_base import Quantizer


class FSQQuantizer(Quantizer):
    """Rounds each of a few bounded dimensions to one of its levels; as in the paper, there is no entropy term."""

    def __init__(self, config, input_size: int):
        levels = config.fsq_levels
        super().__init__(config, input_size, len(levels))
        self.levels = tuple(levels)
        self.measures_entropy = False

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        """bound(x) = tanh(x + atanh(o / h)) · h − o, h = (L − 1)(1 + 1e-3) / 2; o = 1/2 for even L, else 0."""
        levels = torch.tensor(self.levels, device=vectors.device, dtype=vectors.dtype)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / half).atanh()).tanh() * half - offset

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Digits round(x), and codes Σ_i (digit_i + ⌊L_i / 2⌋) · Π_{j<i} L_j."""
        digits = vectors.detach().round()
        codes = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
        for axis, levels in reversed(list(enumerate(self.levels))):
            codes = codes * levels + (digits[:, axis].long() + levels // 2).clamp(0, levels - 1)
        return codes, digits

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        digits = []
        for levels in self.levels:
            digits.append((codes % levels - levels // 2).float())
            codes = codes // levels
        return self._unit(torch.stack(digits, dim=-1))

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self._unit(super().connect(vectors, chosen))

    def _unit(self, digits: torch.Tensor) -> torch.Tensor:
        """Digits scaled to [−1, 1]."""
        return digits / torch.tensor([levels // 2 for levels in self.levels], device=digits.device)
