"""TokenPosterior: clean latents by way of the tokens that may stand in a chunk.

    l = log p(x_t | token)                        evidence: what the noisy latents say of each token, a linear Gaussian model
    h = heads(c)                                  prior: what the text before says of each token of the block's first chunk
    g = E[row of table | l, h]                    first guess at each token by itself; later ones take s instead of h
    s = h + denoiser(g of the tokens before, h, t, c)         what the guesses before a token, too, say of it
    p = softmax(l + table · s)                    Bayes' rule: the posterior of each token, given x_t and c
    x̂1 = write(Σ p · embedding)                   its expected latent

A latent is nearly a linear function of the embeddings of its tokens, so the tokens' posteriors give E[x1 | x_t, c], which
the flow's velocity needs. `table` is the embedding of the context, which predicts text; that of the VAE tells tokens apart.
With `heads_first`, s = h for a block's first chunk at t = 0, where x_t says nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .tokcom_context_encoder import embedding_table
from .tokcom_denoise import Denoised
from .tokcom_evidence import Evidence
from .tokcom_flow_matching import expand_time
from .tokcom_token_order import without_order

# Logits that are held at once, in numbers: 128 MiB of float32. Larger batches are processed in parts, which the backward
# pass computes again.
LOGITS_AT_ONCE = 2**25
# Products that are kept in generation: two for each time of its small steps, and three more. Of scores, 16 MiB.
MOST_KEPT, SCORES_KEPT = 256, 2**22


class TokenPosterior(nn.Module):
    """What leads from noisy latents to states of tokens, and from posteriors of tokens to clean latents.

    The denoiser of such a model is causal. It reads and returns states of the width of the context, one for each token of a
    block; where it reads true tokens instead of guesses, it is a language model. The module has no `forward`, because
    accelerate's hooks would move the models that it is given.

    The evidence is that of a linear Gaussian model of the latents, x1 = center + Σ_i W_i (e_i − mean) + rest, where e_i is
    the embedding of the token at place i of the chunk. For the token at one place, all else is noise of the covariance
    rotation · diag(variance) · rotationᵀ, so that, but for terms that are the same for all tokens v of embedding e,

        log p(x_t | v) = t · eᵀ Dᵀ Λ y − t²/2 · (e − mean)ᵀ Dᵀ Λ D (e − mean),                  D = rotationᵀ W
        y = rotationᵀ (x_t − t · center),          Λ = 1 / (t² · variance + (1 − t)² · noise_std²), a diagonal matrix

    `fit` finds the buffers: center (latent,), mean (embedding,), and for each place rotation (places, latent, latent),
    variance (places, latent) and directions D (places, latent, embedding). Before it, the evidence says nothing.
    """

    rotation: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        places, latent = config.vae.chunk_size, config.vae.latent_size
        embedding, state = config.vae.hidden_size, config.context.hidden_size
        self.noise_std = config.noise_std
        self.read = nn.Linear(state, state)
        self.register_buffer("center", torch.zeros(latent))
        self.register_buffer("mean", torch.zeros(embedding))
        self.register_buffer("rotation", torch.eye(latent).repeat(places, 1, 1))
        self.register_buffer("variance", torch.ones(places, latent))
        self.register_buffer("directions", torch.zeros(places, latent, embedding))
        # By name: places and versions of tensors, the tensors, and what was computed of them.
        self._kept: dict[str, tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]] = {}

    def reset(self) -> None:
        """Sets the buffers to those of an evidence that says nothing."""
        for buffer in (self.center, self.mean, self.directions):
            init.zeros_(buffer)
        init.copy_(self.rotation, torch.eye(self.rotation.shape[1]).expand_as(self.rotation))
        init.ones_(self.variance)

    def train(self, mode: bool = True) -> "TokenPosterior":
        self._kept.clear()
        return super().train(mode)

    def predict(self, model, denoiser, x_t, timesteps, context, earlier, labels) -> Denoised:
        """Predicts the clean latents; arguments as in `denoise`."""
        (blocks, chunks), places = x_t.shape[:2], len(self.variance)
        table = model.context.table(x_t.device)
        # 1. The noisy latents are evidence of each token.
        evidence = self.evidence(model, x_t, timesteps)
        # 2. The heads tell what the text before says of the block's first chunk.
        heads = self.prior(model, context, blocks)
        states, heads_first = heads, self._heads_first(model, context, timesteps)
        if chunks > 1 or not heads_first:
            # 3. Evidence and heads, or the prediction before, give a guess at each token.
            guess = self._guess(table, evidence, heads, earlier)
            # 4. The denoiser tells what the guesses before a token say of it.
            states = self.follow(denoiser, table, guess, heads, timesteps, context)
        if heads_first:
            states = torch.cat([heads, states[:, places:]], dim=1)
        # 5. With the evidence it gives the posterior of each token, whose expected embeddings make the latent.
        labels = None if labels is None else labels.flatten(0, 1)
        rows, by_chunk, scores = evidence.embedding.to(table.dtype), states.view(blocks * chunks, places, -1), None
        if not torch.is_grad_enabled() and blocks * chunks * places * len(table) <= SCORES_KEPT:
            scores = nn.functional.linear(by_chunk, table).float()
        means, entropy = self._expect(rows, evidence, by_chunk, table, labels, scores)
        return Denoised(self.write(means).view(blocks, chunks, -1), states, scores, entropy)

    def prior(self, model, context, blocks: int) -> torch.Tensor:
        """The heads' states of the first chunk of each block, (blocks, places, state); zeros without a context."""
        dtype, device = self.read.weight.dtype, self.read.weight.device
        if context is None:
            return torch.zeros(blocks, len(self.variance), self.read.in_features, dtype=dtype, device=device)
        return model.context.head_states(context.to(dtype))

    def _heads_first(self, model, context, timesteps) -> bool:
        """Whether the heads alone predict the first chunks: at t = 0, if no block's text is hidden."""
        if not model.config.heads_first or context is None or bool(timesteps.any()):
            return False
        return bool(context.any(dim=-1).all())

    def latents_of(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, scored: bool):
        """Clean latents, like `x_t`, by steps 1 and 5 alone, with the `states` or scores that `predict` found."""
        evidence, table = self.evidence(model, x_t, timesteps), model.context.table(x_t.device)
        states = states.view(len(evidence.fields), len(self.variance), -1)
        given = {"states": None, "scores": states} if scored else {"states": states}
        means, _ = self._expect(evidence.embedding.to(table.dtype), evidence, table=table, **given)
        return self.write(means).view(x_t.shape)

    def write(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The latents (chunks, latent) of expected embeddings (chunks, places, embedding): center + Σ_i W_i (e_i − mean)."""
        center, mean, rotation, _, directions = self._fitted(embeddings.device)
        # The maps W_i, side by side, (places · embedding, latent).
        of = (self.rotation, self.directions)
        added = self._keep("added", of, lambda: torch.einsum("plk,pke->pel", rotation, directions).flatten(0, 1))
        return (center + (embeddings.float() - mean).flatten(1) @ added).to(embeddings.dtype)

    def follow(self, denoiser, table, guess, heads, timesteps, context) -> torch.Tensor:
        """States of the tokens of blocks, (blocks, tokens, state), that follow the text and the guesses before them.

        guess: rows of the table that are expected of each token, (chunks of all blocks, places, state).
        heads: `prior` of the blocks.
        """
        places, chunks = heads.shape[1], len(guess) // len(heads)
        prior = nn.functional.pad(heads, (0, 0, 0, (chunks - 1) * places))
        # In units of the table, the length of a guess tells how sure it is.
        read = self.read(guess / self._scale(table).to(guess.dtype)).view(prior.shape)
        before = nn.functional.pad(read[:, :-1], (0, 0, 1, 0))
        times = timesteps if timesteps.dim() == 1 else timesteps.repeat_interleave(places, dim=1)
        return prior + denoiser(prior + before, times, context=context, return_dict=True).clean_latents

    @torch.no_grad()
    def _guess(self, table, evidence, heads, earlier) -> torch.Tensor:
        """Expected row of the table for each token, (chunks of all blocks, places, state).

        heads: `prior` of the blocks.
        earlier: the prediction before, whose states take the place of the heads'.
        """
        if earlier is not None and earlier.states is not None:
            states = earlier.states.view(len(evidence.fields), heads.shape[1], -1)
            return self._expect(table, evidence, states, table, scores=earlier.scores)[0]
        chunks = len(evidence.fields) // len(heads)
        if chunks == 1:
            return self._expect(table, evidence, heads, table)[0]
        guess, _ = self._expect(table, evidence, None, table)
        guess[::chunks], _ = self._expect(table, evidence[::chunks], heads, table)
        return guess

    def _scale(self, table: torch.Tensor) -> torch.Tensor:
        """Root mean square of the table, a scalar."""
        with torch.no_grad():
            return self._keep("scale", (table,), lambda: table.float().square().mean().sqrt())

    def evidence(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor) -> Evidence:
        """What latents x_t (blocks, chunks, latent) at times t, (1,), (blocks,) or (blocks, chunks), say of each token."""
        config, device = model.config.vae, x_t.device
        embedding = embedding_table(model.vae.embed_tokens, config.vocab_size, device)
        # Without autocast: near t = 1 the evidence has large numbers, of which the differences count.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            center, mean, rotation, variance, directions = self._fitted(device)
            t = expand_time(timesteps.to(device, torch.float32), x_t)
            t = t.expand(*(1, 1) if t.numel() == 1 else x_t.shape[:2], 1).reshape(-1, 1, 1)
            shifted = x_t.float().flatten(0, 1) - t[:, 0] * center
            precision = 1 / (t**2 * variance + ((1 - t) * self.noise_std) ** 2).clamp(min=1e-6)
            of = (embedding, self.mean, self.rotation, self.variance, self.directions)
            lengths = self._keep(
                "lengths", of, lambda: torch.einsum("vh,pkh->pvk", embedding.float() - mean, directions) ** 2
            )
            curvature = t**2 / 2 * precision
            if len(curvature) > 1 or device.type != "cpu":
                turned = torch.einsum("nl,plk->npk", shifted, rotation)
                fields = t * torch.einsum("npk,pkh->nph", turned * precision, directions)
                return Evidence(fields, curvature, embedding.float(), lengths, config.omni_token_id)
            # All chunks are at one time, as in generation: one linear map and one sum over directions serve them all.
            gain = self._keep(
                f"gain at {t.item()}",
                of,
                lambda: torch.einsum("plk,pk,pkh->lph", rotation, t[0] * precision[0], directions).flatten(1),
            )
            summed = self._keep(
                f"lengths at {t.item()}", of, lambda: torch.einsum("pk,pvk->pv", curvature[0], lengths)
            )
            fields = (shifted @ gain).view(len(shifted), len(variance), -1)
            return Evidence(fields, None, embedding.float(), summed, config.omni_token_id)

    def _fitted(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """center, mean, rotation, variance, directions."""
        buffers: Any = (self.center, self.mean, self.rotation, self.variance, self.directions)
        return tuple(buffer.to(device, torch.float32) for buffer in buffers)

    def _keep(self, name: str, of: tuple[torch.Tensor, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
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
            # With the tensors, whose place in memory no other one can take as long as they are kept.
            kept = self._kept[name] = (key, of, compute())
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

    def _expect(
        self, rows, evidence, states, table, labels=None, scores=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means of `rows` (vocab, width) under the posteriors, (chunks, places, width), and cross-entropy of the labels.

        states: (chunks, places, state), whose products with the table are added to the evidence; None adds nothing.
        labels: (chunks, places), -100 for those that do not count.
        scores: the products of the states with the table, (chunks, places, vocab), if they are known.
        """

        def expect(part, states, labels):
            # All logits in one part are computed once, for the guess and the posterior.
            logits = (evidence if len(parts) == 1 else evidence[part]).logits()
            if scores is not None:
                logits = logits + scores[part]
            elif states is not None:
                logits = logits + nn.functional.linear(states, table).float()
            mean = logits.softmax(dim=-1).to(rows.dtype) @ rows
            if labels is None:
                return mean, None
            nats = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
            )
            return mean, nats

        count, size = len(evidence.fields), max(1, LOGITS_AT_ONCE // (len(table) * len(self.variance)))
        parts = [slice(start, start + size) for start in range(0, count, size)]
        again = torch.is_grad_enabled() and len(parts) > 1
        found = []
        for part in parts:
            arguments = (part, *(None if of_all is None else of_all[part] for of_all in (states, labels)))
            found.append(checkpoint(expect, *arguments, use_reentrant=False) if again else expect(*arguments))
        means = torch.cat([mean for mean, _ in found])
        if labels is None:
            return means, None
        return means, torch.stack([nats for _, nats in found]).sum() / (labels != -100).sum().clamp(min=1)
