"""TokenPosterior: clean latents by way of the tokens that may stand in a chunk.

    l = decoder(E[x1 | x_t])                          evidence: what the noisy latents say of each token, frozen VAE
    s = heads(c) + denoiser(state of each token, t, c)        what the text before and the other tokens say of it
    p = softmax(l + table · s)                                Bayes' rule: the posterior of each token, given x_t and c
    x̂1 = write(Σ p · embedding, side by side)                 its expected latent

A latent is nearly a linear function of the embeddings of its tokens, so the tokens' posteriors give E[x1 | x_t, c], which
the flow's velocity needs. `table` is the embedding of the context, which predicts text; that of the VAE tells tokens apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .tokcom_context_encoder import embedding_table
from .tokcom_flow_matching import expand_time

# Logits that are held at once, in numbers: 128 MiB of float32. Larger batches are processed in parts, which the backward
# pass computes again.
LOGITS_AT_ONCE = 2**25


@dataclass
class Denoised:
    """A prediction of the clean latents.

    clean_latents: x̂1 in the flow's space, (blocks, chunks, latent).
    cross_entropy: of the tokens' posterior, nats per token; None without labels or without a `TokenPosterior`.
    """

    clean_latents: torch.Tensor
    cross_entropy: torch.Tensor | None = None


def denoise(
    model: Any,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor | None = None,
    self_condition: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    denoiser: nn.Module | None = None,
    labels: torch.Tensor | None = None,
) -> Denoised:
    """Predicts the clean latents with the denoiser of a `TokComModel` and, if it has one, its `TokenPosterior`.

    Args:
        x_t, timesteps, context, self_condition, attention_mask: as in `DenoisedModel.forward`.
        denoiser: takes the place of `model.denoiser`.
        labels: tokens of the blocks, (blocks, chunks, chunk_size), -100 for those that do not count.
    """
    denoiser = model.denoiser if denoiser is None else denoiser
    if model.posterior is not None:
        return model.posterior.predict(model, denoiser, x_t, timesteps, context, attention_mask, labels)
    told = {"context": context, "self_condition": self_condition, "attention_mask": attention_mask}
    output = denoiser(x_t, timesteps, **told, return_dict=True)
    return Denoised(output.clean_latents)


class TokenPosterior(nn.Module):
    """What leads from noisy latents to states of tokens, and from posteriors of tokens to clean latents.

    The denoiser of such a model reads and returns states of the width of the context, one for each token. The module has no
    `forward`, because accelerate's hooks would move the models that it is given.
    """

    def __init__(self, config: Any):
        super().__init__()
        embedding, state = config.vae.hidden_size, config.context.hidden_size
        self.chunk_size = config.vae.chunk_size
        self.read = nn.Linear(embedding + state, state)
        self.write = nn.Linear(config.vae.chunk_size * embedding, config.vae.latent_size)

    def predict(self, model, denoiser, x_t, timesteps, context, attention_mask, labels) -> Denoised:
        """Predicts the clean latents; arguments as in `denoise`."""
        (blocks, chunks), size = x_t.shape[:2], self.chunk_size
        table = model.context.table(x_t.device)
        # 1. Read the evidence of each token from the noisy latents.
        with torch.no_grad():
            hidden = self.evidence(model, x_t, timesteps)
            guess = torch.cat([likely @ table for likely in self._likely(model, hidden)])
            guess = nn.functional.rms_norm(guess.float(), guess.shape[-1:]).to(hidden.dtype)
        # 2. The heads tell what the text before says of the block's first chunk.
        prior = hidden.new_zeros(blocks, 1, 1)
        if context is not None:
            prior = model.context.head_states(context.to(self.read.weight.dtype))
            prior = nn.functional.pad(prior, (0, 0, 0, (chunks - 1) * size))
        states = self.read(torch.cat([hidden, guess], dim=-1)).view(blocks, chunks * size, -1) + prior
        # 3. The denoiser makes the tokens of the block fit each other, and the text before.
        times = timesteps if timesteps.dim() == 1 else timesteps.repeat_interleave(size, dim=1)
        mask = None if attention_mask is None else attention_mask.repeat_interleave(size, dim=1)
        states = prior + denoiser(states, times, context=context, attention_mask=mask, return_dict=True).clean_latents
        # 4. Both together give the posterior of each token, whose expected embeddings make the latent.
        flat = None if labels is None else labels.flatten()
        means, entropy = self._expected_embeddings(model, table, states.flatten(0, 1), hidden, flat)
        return Denoised(self.write(means.view(blocks, chunks, -1)), entropy)

    def evidence(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """States (blocks · chunks · chunk_size, embedding) of the frozen decoder, which has read the noisy latents x_t.

        It reads t·x_t / (t² + (1 − t)²·noise_std²), the best linear estimate of clean latents of variance 1.
        """
        t = expand_time(timesteps.to(x_t.device, torch.float32), x_t)
        estimate = x_t.float() * t / (t**2 + ((1 - t) * model.config.noise_std) ** 2)
        latents = model.unstandardize(estimate).flatten(0, 1).to(model.vae.lm_head.weight.dtype)
        return model.vae.decode_hidden(latents).flatten(0, 1)

    @torch.no_grad()
    def fit(self, model: Any, input_ids: torch.Tensor) -> None:
        """Sets `write` to the linear function that comes nearest to the VAE's encoder on chunks (count, chunk_size)."""
        embeddings = model.vae.embed_tokens(input_ids).flatten(1).float()
        inputs = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], dim=1)
        latents = model.standardize(model.encode(input_ids))[:, 0].float()
        # A little weight on small coefficients makes the solution unique where chunks are few.
        gram = inputs.T @ inputs
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        solution = torch.linalg.solve(gram, inputs.T @ latents)
        self.write.weight.copy_(solution[:-1].T)
        self.write.bias.copy_(solution[-1])

    def _parts(self, tokens: int, vocabulary: int) -> list[slice]:
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        return [slice(start, start + rows) for start in range(0, tokens, rows)]

    def _likely(self, model: Any, hidden: torch.Tensor):
        """Softmax of the evidence, (tokens, vocab), in parts."""
        for part in self._parts(len(hidden), model.config.vae.vocab_size):
            logits = _without(model.config.vae.omni_token_id, model.vae.lm_head(hidden[part]).float())
            yield logits.softmax(dim=-1).to(hidden.dtype)

    def _expected_embeddings(self, model, table, states, hidden, labels) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean embeddings (tokens, embedding) under the posteriors, and the cross-entropy of the labels (tokens,)."""
        embedding = embedding_table(model.vae.embed_tokens, len(table), states.device)

        def expect(states, hidden, labels):
            logits = nn.functional.linear(states, table).float() + model.vae.lm_head(hidden).float()
            logits = _without(model.config.vae.omni_token_id, logits)
            mean = logits.softmax(dim=-1).to(hidden.dtype) @ embedding
            if labels is None:
                return mean, None
            return mean, nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

        parts = self._parts(len(states), len(table))
        again = torch.is_grad_enabled() and len(parts) > 1
        found = []
        for part in parts:
            arguments = (states[part], hidden[part], None if labels is None else labels[part])
            found.append(checkpoint(expect, *arguments, use_reentrant=False) if again else expect(*arguments))
        means = torch.cat([mean for mean, _ in found])
        if labels is None:
            return means, None
        return means, torch.stack([sum_ for _, sum_ in found]).sum() / (labels != -100).sum().clamp(min=1)


def _without(token: int, logits: torch.Tensor) -> torch.Tensor:
    """Logits (…, vocab) that exclude a token."""
    return logits.index_fill(-1, torch.tensor([token], device=logits.device), torch.finfo(logits.dtype).min)
