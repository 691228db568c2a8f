"""LinearLatents: latents as a linear Gaussian function of their tokens' embeddings, which is fitted once.

evidence(x_t, t) → log p(x_t | token) of each token           write(expected embeddings) → the expected latent
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .tokcom_context_encoder import embedding_table
from .tokcom_evidence import Evidence
from .tokcom_flow_matching import expand_time
from .tokcom_token_order import without_order

# Products that are kept in generation: one for each time of its small steps, and five more.
MOST_KEPT = 256


class LinearLatents(nn.Module):
    """The model x1 = center + Σ_i W_i (e_i − mean) + rest, where e_i is the embedding of the token at place i of a chunk.

    For the token at one place, all else is noise of the covariance rotation · diag(variance) · rotationᵀ, so that, but for
    terms that are the same for all tokens v of embedding e,

        log p(x_t | v) = t · eᵀ Dᵀ Λ y − t²/2 · (e − mean)ᵀ Dᵀ Λ D (e − mean),                  D = rotationᵀ W
        y = rotationᵀ (x_t − t · center),          Λ = 1 / (t² · variance + (1 − t)² · noise_std²), a diagonal matrix

    `fit` finds the buffers: center (latent,), mean (embedding,), and for each place rotation (places, latent, latent),
    variance (places, latent) and directions D (places, latent, embedding). Before it, the evidence says nothing.
    """

    rotation: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        places, latent, embedding = config.vae.chunk_size, config.vae.latent_size, config.vae.hidden_size
        self.noise_std = config.noise_std
        self.register_buffer("center", torch.zeros(latent))
        self.register_buffer("mean", torch.zeros(embedding))
        self.register_buffer("rotation", torch.eye(latent).repeat(places, 1, 1))
        self.register_buffer("variance", torch.ones(places, latent))
        self.register_buffer("directions", torch.zeros(places, latent, embedding))
        # By name: places and versions of tensors, the tensors, and what was computed of them.
        self._kept: dict[str, tuple[Any, tuple[torch.Tensor, ...], Any]] = {}

    def reset(self) -> None:
        """Sets the buffers to those of an evidence that says nothing."""
        for buffer in (self.center, self.mean, self.directions):
            init.zeros_(buffer)
        init.copy_(self.rotation, torch.eye(self.rotation.shape[1]).expand_as(self.rotation))
        init.ones_(self.variance)

    def train(self, mode: bool = True) -> "LinearLatents":
        self._kept.clear()
        return super().train(mode)

    def write(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The latents (chunks, latent) of expected embeddings (chunks, places, embedding): center + Σ_i W_i (e_i − mean)."""
        center, mean, rotation, _, directions = self._fitted(embeddings.device)
        # The maps W_i, side by side, (places · embedding, latent).
        of = (self.rotation, self.directions)
        added = self._keep("added", of, lambda: torch.einsum("plk,pke->pel", rotation, directions).flatten(0, 1))
        return (center + (embeddings.float() - mean).flatten(1) @ added).to(embeddings.dtype)

    def evidence(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor) -> Evidence:
        """What latents x_t (blocks, chunks, latent) at times t, (1,), (blocks,) or (blocks, chunks), say of each token."""
        config, device = model.config.vae, x_t.device
        embedding = embedding_table(model.vae.embed_tokens, config.vocab_size, device)
        of = (embedding, self.mean, self.rotation, self.variance, self.directions)
        # Without autocast: near t = 1 the evidence has large numbers, of which the differences count.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x, t = x_t.float().flatten(0, 1), expand_time(timesteps.to(device, torch.float32), x_t)
            if t.numel() == 1 and device.type == "cpu":
                # All chunks are at one time, as in generation: one affine map and one sum of lengths serve them all.
                gain, offset, summed = self._keep(f"at {t.item()}", of, lambda: self._at(embedding, t.view(1, 1, 1)))
                fields = torch.addmm(offset, x, gain).view(len(x), len(self.variance), -1)
                return Evidence(fields, None, embedding.float(), summed, config.omni_token_id)
            center, mean, rotation, variance, directions = self._fitted(device)
            t = t.expand(*(1, 1) if t.numel() == 1 else x_t.shape[:2], 1).reshape(-1, 1, 1)
            precision = self._precision(t, variance)
            turned = torch.einsum("nl,plk->npk", x - t[:, 0] * center, rotation)
            fields = t * torch.einsum("npk,pkh->nph", turned * precision, directions)
            lengths = self._keep("lengths", of, lambda: self._lengths(embedding, mean, directions))
            return Evidence(fields, t**2 / 2 * precision, embedding.float(), lengths, config.omni_token_id)

    def _at(self, embedding: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What makes evidence of latents at time t (1, 1, 1): fields = x_t · gain + offset, and summed lengths."""
        center, mean, rotation, variance, directions = self._fitted(embedding.device)
        precision = self._precision(t, variance)[0]
        gain = torch.einsum("plk,pk,pkh->lph", rotation, t[0] * precision, directions).flatten(1)
        lengths = self._lengths(embedding, mean, directions)
        return gain, -t.item() * center @ gain, torch.einsum("pk,pvk->pv", t[0] ** 2 / 2 * precision, lengths)

    def _precision(self, t: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Λ of each place, (…, places, latent)."""
        return 1 / (t**2 * variance + ((1 - t) * self.noise_std) ** 2).clamp(min=1e-6)

    def _lengths(self, embedding: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """Squared length of each embedding along each direction, (places, vocab, latent)."""
        return torch.einsum("vh,pkh->pvk", embedding.float() - mean, directions) ** 2

    def _fitted(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """center, mean, rotation, variance, directions."""
        buffers: Any = (self.center, self.mean, self.rotation, self.variance, self.directions)
        return tuple(buffer.to(device, torch.float32) for buffer in buffers)

    def _keep(self, name: str, of: tuple[torch.Tensor, ...], compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the tensors `of`, kept in generation as long as they are the same."""
        # Nothing tells whether a sharded parameter, an adapter's sum, an offloaded table or an inference tensor has changed.
        plain = isinstance(of[0], nn.Parameter) or of[0] is self.rotation
        untold = not plain or any(tensor.is_inference() for tensor in of)
        if self.training or torch.is_grad_enabled() or untold:
            return compute()
        # The shape, because a resized table may lie where the former one lay.
        key = [(tensor.data_ptr(), tensor._version, tensor.shape) for tensor in of]
        # Read once, because another thread may replace it.
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            # Without autocast, whose type would be kept for calls without it.
            with torch.autocast(of[0].device.type, enabled=False):
                value = compute()
            # With the tensors, whose place in memory no other one can take as long as they are kept.
            kept = self._kept[name] = (key, of, value)
        return kept[2]

    @torch.no_grad()
    def fit(self, model: Any, input_ids: torch.Tensor) -> None:
        """Fits evidence, `write` and `model.order` to the VAE's encoder, by least squares on chunks (count, chunk_size)."""
        embeddings = model.vae.embed_tokens(input_ids).float()
        tokens, size = embeddings.flatten(0, 1), embeddings.shape[2]
        mean, spread = tokens.mean(dim=0), torch.cov(tokens.T, correction=0)
        inputs = (embeddings - mean).flatten(1)
        # A little weight on small coefficients makes the solution unique where chunks are few.
        gram = inputs.T @ inputs
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        latents = without_order(model, model.standardize(model.encode(input_ids)))[:, 0].float()
        center = latents.mean(dim=0)
        solution = torch.linalg.solve(gram, inputs.T @ (latents - center))
        rest = latents - center - inputs @ solution
        # What each place of a chunk adds to the latent, and its covariance.
        parts = solution.unflatten(0, (-1, size)).transpose(1, 2)
        covariances, left = parts @ spread @ parts.transpose(1, 2), rest.T @ rest / len(rest)
        if model.order is not None:
            scale = model.order.fit(covariances, left)
            center, parts = scale @ center, scale @ parts
            covariances, left = scale @ covariances @ scale.T, scale @ left @ scale.T
        variance, rotation = torch.linalg.eigh(covariances.sum(dim=0) - covariances + left)
        for buffer, value in {
            self.center: center, self.mean: mean, self.rotation: rotation, self.variance: variance.clamp(min=0),
            self.directions: rotation.transpose(1, 2) @ parts,
        }.items():  # fmt: skip
            buffer.copy_(value)
