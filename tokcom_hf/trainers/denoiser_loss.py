"""The denoiser's loss: velocity-weighted squared error of the clean latents, and cross-entropy of their tokens."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models.chunked_cross_entropy import chunked_cross_entropy
from ..models.flow_matching import velocity_weight


@dataclass
class NoisedBatch:
    """What the outputs for a noised batch are compared with.

    Attributes:
        clean: (batch, chunks, latent), standardised.
        times: (batch, chunks), 0 noise to 1 clean.
        counted: (batch, chunks) bool, the chunks that are part of the loss.
        input_ids: (batch, chunks · chunk size).
        asked: (batch, chunks, chunk size) bool, the tokens that the cross-entropy asks for; None for all. Then the outputs'
            `token_hidden` are theirs alone, (tokens, width).
        share: scalar, what the tokens asked for are of all counted ones. The loss of the others is zero, while the part
            "batch_ce_loss" is the mean over those asked for.
        unseen: (tokens,) bool, those asked for whose latents are all noise.
    """

    clean: torch.Tensor
    times: torch.Tensor
    counted: torch.Tensor
    input_ids: torch.LongTensor
    asked: torch.Tensor | None = None
    share: torch.Tensor | None = None
    unseen: torch.Tensor | None = None

    def ask(self, tokens: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        """Restricts the cross-entropy to the counted ones of `tokens` (batch, chunks, chunk size); returns their mask."""
        asked = tokens & self.counted.unsqueeze(-1)
        self.share = asked.sum() / (self.counted.sum() * asked.shape[-1]).clamp(min=1)
        # With no token to ask for, one of them still puts every parameter into the graph, with no weight.
        asked.view(-1)[0] |= ~asked.any()
        self.asked, self.unseen = asked, unseen[asked]
        return asked


def denoiser_loss(tokcom: Any, outputs: Any, batch: NoisedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`mse_weight` · velocity-weighted error of x1 + `cross_entropy_weight` · cross-entropy of its tokens.

    Args:
        tokcom: `TokComModel` whose config has the weights.
        outputs: its `DenoisedModelOutput`: `clean_latents`, None where only tokens are predicted, and `token_hidden`, None
            where tokens are the decoder's, of the latents.
        batch: what they are compared with.

    Returns:
        the scalar loss, and its parts by name.
    """
    config, counted = tokcom.config, batch.counted
    predicted, token_hidden = outputs.clean_latents, outputs.token_hidden
    # A row of padding behind its clean prefix counts nowhere: sums over at least one position, never a mean of none.
    count = counted.sum().clamp(min=1)
    loss = (predicted if token_hidden is None else token_hidden).float().sum() * 0.0
    parts: dict[str, torch.Tensor] = {}
    if predicted is not None:
        error = ((predicted.float() - batch.clean.float()) ** 2).mean(dim=-1) * counted
        parts["batch_mse_loss"] = error.sum() / count
        if config.mse_weight > 0:
            parts["batch_velocity_loss"] = (velocity_weight(batch.times) * error).sum() / count
            loss = loss + config.mse_weight * parts["batch_velocity_loss"]
    if config.cross_entropy_weight > 0 and bool(counted.any()):
        labels = batch.input_ids.view(*counted.shape, -1)
        if batch.asked is not None:
            entropy = tokcom.token_cross_entropy(token_hidden, labels[batch.asked], batch.unseen)
        elif token_hidden is not None:
            entropy = tokcom.token_cross_entropy(token_hidden[counted].flatten(0, 1), labels[counted].flatten())
        else:
            latents = tokcom.unstandardize(predicted)[counted]
            hidden = tokcom.vae.decode_hidden(latents.to(tokcom.vae.lm_head.weight.dtype)).flatten(0, 1)
            entropy = chunked_cross_entropy(hidden, tokcom.vae.decoder_head(), labels[counted].flatten())
        parts["batch_ce_loss"] = entropy
        loss = loss + config.cross_entropy_weight * (entropy if batch.share is None else entropy * batch.share)
    return loss, parts
