"""Evidence: what noisy latents say of each token, as logits that are computed when they are needed."""

from dataclasses import dataclass

import torch


@dataclass
class Evidence:
    """Logits of the evidence of each token, l = fields · e − curvature · lengths(e), before they are computed.

    fields: (chunks, places, embedding).
    curvature: (chunks, places, latent), or (1, places, latent) if all are at one time; None if the lengths are summed.
    embedding: (vocab, embedding).
    lengths: squared length of each embedding along each direction, (places, vocab, latent); without a curvature their sum,
        weighted by that of the one time of all chunks, (places, vocab).
    omni_token_id: the token that never occurs.
    computed: the logits, once they are.
    """

    fields: torch.Tensor
    curvature: torch.Tensor | None
    embedding: torch.Tensor
    lengths: torch.Tensor
    omni_token_id: int
    computed: torch.Tensor | None = None

    def __getitem__(self, chunks: slice) -> "Evidence":
        curvature = self.curvature
        if curvature is not None and len(curvature) > 1:
            curvature = curvature[chunks]
        computed = None if self.computed is None else self.computed[chunks]
        return Evidence(self.fields[chunks], curvature, self.embedding, self.lengths, self.omni_token_id, computed)

    def logits(self) -> torch.Tensor:
        """(chunks, places, vocab), float32, the omni token excluded."""
        if self.computed is None:
            with torch.no_grad(), torch.autocast(self.fields.device.type, enabled=False):
                logits = self.fields @ self.embedding.T
                if self.curvature is None:
                    logits -= self.lengths
                else:
                    logits -= torch.einsum("npk,pvk->npv", self.curvature, self.lengths)
                logits[..., self.omni_token_id] = torch.finfo(logits.dtype).min
                self.computed = logits
        return self.computed
