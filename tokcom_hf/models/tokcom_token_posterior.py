"""TokenPosterior: clean latents by way of the tokens that may stand in a chunk.

    l = log p(x_t | token)                        evidence: what the noisy latents say of each token, a linear Gaussian model
    h = heads(c)                                  prior: what the text before says of each token of the block's first chunk
    g = E[row of table | l, h]                    first guess at each token by itself
    r = next-token head(context(text, g))         what the context expects of each token, when it reads the guess on
    s = h + trust · (r − h) + denoiser(g, x_t, r, t, c)       what the tokens of the block say of each other
    p = softmax(l + table · s)                    Bayes' rule: the posterior of each token, given x_t and c
    x̂1 = write(Σ p · embedding, side by side)     its expected latent

A latent is nearly a linear function of the embeddings of its tokens, so the tokens' posteriors give E[x1 | x_t, c], which
the flow's velocity needs. `table` is the embedding of the context, which predicts text; that of the VAE tells tokens apart.
Without `reads_guess`, there is no r. With `heads_first`, s = h for a block's first chunk at t = 0, where x_t says nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .tokcom_context_encoder import embedding_table, is_plain
from .tokcom_denoise import Denoised
from .tokcom_evidence import Evidence
from .tokcom_flow_matching import expand_time

# Logits that are held at once, in numbers: 128 MiB of float32. Larger batches are processed in parts, which the backward
# pass computes again.
LOGITS_AT_ONCE = 2**25
# Products that are kept in generation: one for each time of its steps, and three more. Of the heads' scores, 16 MiB.
MOST_KEPT, SCORES_KEPT = 256, 2**22


class TokenPosterior(nn.Module):
    """What leads from noisy latents to states of tokens, and from posteriors of tokens to clean latents.

    The denoiser of such a model reads and returns states of the width of the context, one for each token. The module has no
    `forward`, because accelerate's hooks would move the models that it is given.

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
        self.read_noisy = nn.Linear(latent, places * state, bias=False)
        self.read_next = nn.Linear(state, state, bias=False) if config.reads_guess else None
        self.trust = nn.Linear(state, 1) if config.reads_guess else None
        self.write = nn.Linear(places * embedding, latent)
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

    def predict(self, model, denoiser, x_t, timesteps, before, attention_mask, tokens) -> Denoised:
        """Predicts the clean latents; arguments as in `denoise`."""
        (blocks, chunks), places = x_t.shape[:2], len(self.variance)
        context = None if before is None else before.state
        table = model.context.table(x_t.device)
        # Of a hidden text the heads tell nothing.
        heads_first = model.config.heads_first and before is not None and before.shown is None and tokens.told is None
        heads_first = heads_first and bool((timesteps == 0).all())
        # 1. The noisy latents are evidence of each token.
        evidence = self.evidence(model, x_t, timesteps)
        # 2. The heads tell what the text before says of the block's first chunk.
        heads = x_t.new_zeros(blocks, places, table.shape[1], dtype=self.read.weight.dtype)
        if context is not None:
            heads = model.context.head_states(context.to(heads.dtype))
        states = heads
        if chunks > 1 or not heads_first:
            # 3. Both together give a first guess at each token by itself.
            guess = self._guess(model, table, evidence, heads, context, chunks, tokens.told)
            # 4 and 5. Context and denoiser tell what the tokens of the block say of each other.
            states = self._fit(model, denoiser, x_t, timesteps, before, attention_mask, heads, guess)
        if heads_first:
            states = torch.cat([heads, states[:, places:]], dim=1)
        # 6. With the evidence they give the posterior of each token, whose expected embeddings make the latent.
        labels = None if tokens.asked is None else tokens.asked.flatten(0, 1)
        rows, by_chunk, scores = evidence.embedding.to(table.dtype), states.view(blocks * chunks, places, -1), None
        if not torch.is_grad_enabled() and blocks * chunks * places * len(table) <= SCORES_KEPT:
            scores = nn.functional.linear(by_chunk, table).float()
        means, entropy = self._expect(rows, evidence, by_chunk, table, labels, scores)
        return Denoised(self.write(means.flatten(1)).view(blocks, chunks, -1), states, scores, entropy)

    def latents_of(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, scored: bool):
        """Clean latents, like `x_t`, by steps 1 and 6 alone, with the `states` or scores that `predict` found."""
        evidence, table = self.evidence(model, x_t, timesteps), model.context.table(x_t.device)
        states = states.view(len(evidence.fields), len(self.variance), -1)
        given = {"states": None, "scores": states} if scored else {"states": states}
        means, _ = self._expect(evidence.embedding.to(table.dtype), evidence, table=table, **given)
        return self.write(means.flatten(1)).view(x_t.shape)

    def _fit(self, model, denoiser, x_t, timesteps, before, attention_mask, heads, guess) -> torch.Tensor:
        """States of a block's tokens that fit each other and the text before, (blocks, tokens, state).

        heads: the heads' states of the first chunk, (blocks, places, state).
        guess: first guess at each token, (chunks of all blocks, places, state).
        """
        chunks, places = x_t.shape[1], len(self.variance)
        prior = nn.functional.pad(heads, (0, 0, 0, (chunks - 1) * places))
        guess = guess.view(prior.shape)
        states = self.read(guess / self._scale(model.context.table(x_t.device)).to(guess.dtype))
        states = states + self.read_noisy(x_t.flatten(0, 1).to(guess.dtype)).view(prior.shape) + prior
        # 4. The context reads the guess on, and its next-token head tells what it expects of each token.
        following = None
        if self.read_next is not None and before is not None:
            with torch.no_grad():
                read = before.read_on(guess[:, :-1])
            following = torch.cat([prior[:, :1], model.context.next_states(read.to(prior))], dim=1)
            states = states + self.read_next(following)
        # 5. The denoiser makes the tokens of the block fit each other, and the text before.
        times = timesteps if timesteps.dim() == 1 else timesteps.repeat_interleave(places, dim=1)
        mask = None if attention_mask is None else attention_mask.repeat_interleave(places, dim=1)
        context = None if before is None else before.state
        fit = denoiser(states, times, context=context, attention_mask=mask, return_dict=True).clean_latents
        if self.trust is not None and following is not None:
            prior = torch.lerp(prior, following, self.trust(fit).sigmoid().to(prior.dtype))
        return prior + fit

    @torch.no_grad()
    def _guess(self, model, table, evidence, prior, context, chunks, told) -> torch.Tensor:
        """Expected row of the table for each token by itself, (chunks of all blocks, places, state).

        prior: the heads' states for the first chunk of each block, (blocks, places, state).
        told: tokens that are known, (blocks, chunks, places), -100 for others; None: no token is.
        """
        scores, few = None, prior.shape[0] * prior.shape[1] * len(table) <= SCORES_KEPT
        if context is not None and few and is_plain(model.context.heads, nn.Linear):
            # They are the same in all steps of a block.
            of = (table, model.context.heads.weight, context)
            scores = self._keep("scores", of, lambda: nn.functional.linear(prior, table).float())
        if chunks == 1:
            guess, _ = self._expect(table, evidence, prior, table, scores=scores)
        else:
            guess, _ = self._expect(table, evidence, None, table)
            guess[::chunks], _ = self._expect(table, evidence[::chunks], prior, table, scores=scores)
        if told is not None:
            told = told.flatten(0, 1)
            known = nn.functional.embedding(told.clamp(min=0), table).to(guess.dtype)
            guess = torch.where((told >= 0).unsqueeze(-1), known, guess)
        return guess

    def _scale(self, table: torch.Tensor) -> torch.Tensor:
        """Root mean square of the table: in its units, the length of a guess tells how sure it is."""
        with torch.no_grad():
            return self._keep("scale", (table,), lambda: table.float().square().mean().sqrt())

    def evidence(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor) -> Evidence:
        """What latents x_t (blocks, chunks, latent) at times t, (1,), (blocks,) or (blocks, chunks), say of each token."""
        config, device = model.config.vae, x_t.device
        embedding = embedding_table(model.vae.embed_tokens, config.vocab_size, device)
        # Without autocast: near t = 1 the evidence has large numbers, of which the differences count.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            center, rotation, variance, directions = (
                buffer.to(device, torch.float32)
                for buffer in (self.center, self.rotation, self.variance, self.directions)
            )
            t = expand_time(timesteps.to(device, torch.float32), x_t)
            t = t.expand(*(1, 1) if t.numel() == 1 else x_t.shape[:2], 1).reshape(-1, 1, 1)
            turned = torch.einsum("nl,plk->npk", x_t.float().flatten(0, 1) - t[:, 0] * center, rotation)
            precision = 1 / (t**2 * variance + ((1 - t) * self.noise_std) ** 2).clamp(min=1e-6)
            fields = t * torch.einsum("npk,pkh->nph", turned * precision, directions)
            lengths = self._keep(
                "lengths",
                (embedding, self.mean, self.directions),
                lambda: (
                    torch.einsum("vh,pkh->pvk", embedding.float() - self.mean.to(device, torch.float32), directions)
                    ** 2
                ),
            )
            curvature = t**2 / 2 * precision
            if len(curvature) == 1 and device.type == "cpu":
                # All chunks are at one time, as in generation, so that the sum over the directions serves them all.
                lengths = self._keep(
                    f"lengths at {t.item()}",
                    (embedding, self.mean, self.directions, self.variance),
                    lambda: torch.einsum("pk,pvk->pv", curvature[0], lengths).unsqueeze(-1),
                )
                curvature = curvature.new_ones(1, len(variance), 1)
            return Evidence(fields, curvature, embedding.float(), lengths, config.omni_token_id)

    def _keep(self, name: str, of: tuple[torch.Tensor, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` makes of the tensors `of`, kept in generation as long as they are the same."""
        # Nothing tells whether a sharded parameter, an adapter's sum, an offloaded table or an inference tensor has changed.
        untold = not isinstance(of[0], nn.Parameter) or any(tensor.is_inference() for tensor in of)
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
        """Fits `write`, evidence and `model.order` to the VAE's encoder, by least squares on chunks (count, chunk_size)."""
        embeddings = model.vae.embed_tokens(input_ids).float()
        tokens, size = embeddings.flatten(0, 1), embeddings.shape[2]
        mean, spread = tokens.mean(dim=0), torch.cov(tokens.T, correction=0)
        inputs = (embeddings - mean).flatten(1)
        # A little weight on small coefficients makes the solution unique where chunks are few.
        gram = inputs.T @ inputs
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        if model.order is not None:
            model.order.reset()
        latents = model.standardize(model.encode(input_ids))[:, 0].float()
        center = latents.mean(dim=0)
        solution = torch.linalg.solve(gram, inputs.T @ (latents - center))
        rest = latents - center - inputs @ solution
        # What each place of a chunk adds to the latent, and its covariance.
        parts = solution.unflatten(0, (-1, size)).transpose(1, 2)
        covariances, left = parts @ spread @ parts.transpose(1, 2), rest.T @ rest / len(rest)
        if model.order is not None:
            scale = model.order.fit(covariances, left)
            center, solution, parts = scale @ center, solution @ scale.T, scale @ parts
            covariances, left = scale @ covariances @ scale.T, scale @ left @ scale.T
        variance, rotation = torch.linalg.eigh(covariances.sum(dim=0) - covariances + left)
        for buffer, value in {
            self.write.weight: solution.T, self.write.bias: center - mean.repeat(len(parts)) @ solution,
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
