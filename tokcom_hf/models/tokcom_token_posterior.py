"""TokenPosterior: clean latents by way of the tokens that may stand in a chunk.

    l = log p(x_t | token)                        evidence: what the noisy latents say of each token, a linear Gaussian model
    h = heads(c)                                  prior: what the text before says of each token of the block's first chunk
    g = E[row of table | l, h]                    first guess at each token by itself; later ones take s instead of h
    h = first head(context reads g behind the text)           with `read_guesses`, of all tokens but the block's first
    u = 1 − Π max p of the tokens before                      with `read_guesses`, how likely a guess is wrong; else 1
    s = h + u · denoiser(g of the tokens before, h, t, c)     what the guesses before a token, too, say of it
    s += recent(g of three tokens before, s)      with `recent_size`: what the guesses now say, between two calls, too
    p = softmax(l + table · s)                    Bayes' rule: the posterior of each token, given x_t and c
    x̂1 = write(Σ p · embedding)                   its expected latent

A latent is nearly a linear function of the embeddings of its tokens, so the tokens' posteriors give E[x1 | x_t, c], which
the flow's velocity needs. `table` is the embedding of the context, which predicts text; that of the VAE tells tokens apart.
With `heads_first`, s = h for a block's first chunk at t = 0, where x_t says nothing. With `read_guesses`, s = h for a
block's first token, too: nothing is guessed before it, so that the context knows its probabilities. While denoiser and
recent tokens learn, in `TokComModel.forward`, they add to every token, and u = 1.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .tokcom_denoise import Denoised, PathPoint
from .tokcom_linear_latents import LinearLatents

# Logits that are held at once, in numbers: 128 MiB of float32. Larger batches are processed in parts, which the backward
# pass computes again.
LOGITS_AT_ONCE = 2**25
# Scores that are kept between two calls in generation, in numbers: 16 MiB.
SCORES_KEPT = 2**22


class TokenPosterior(LinearLatents):
    """What leads from noisy latents to states of tokens, and from posteriors of tokens to clean latents.

    The denoiser of such a model is causal. It reads and returns states of the width of the context, one for each token of a
    block; where it reads true tokens instead of guesses, it is a language model. The module has no `forward`, because
    accelerate's hooks would move the models that it is given.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.read = nn.Linear(config.context.hidden_size, config.context.hidden_size)

    def predict(self, model, x_t, timesteps, text, earlier, labels, learns) -> Denoised:
        """Predicts the clean latents after `text`, a `TextBefore` or None; other arguments as in `denoise`."""
        (blocks, chunks), places = x_t.shape[:2], len(self.variance)
        table, context = model.context.table(x_t.device), None if text is None else text.state
        known = None if learns or context is None or not model.config.read_guesses else context.any(dim=-1)
        # 1. The noisy latents are evidence of each token.
        evidence = self.evidence(model, x_t, timesteps)
        # 2. The heads tell what the text before says of the block's first chunk.
        heads = self.prior(model, context, blocks)
        states, heads_first = heads, self._heads_first(model, context, timesteps)
        if chunks > 1 or not heads_first:
            # 3. Evidence and heads, or the prediction before, give a guess at each token.
            point = earlier if isinstance(earlier, PathPoint) else PathPoint(x_t, timesteps)
            then = evidence if point.x_t is x_t else self.evidence(model, point.x_t, point.timesteps)
            guess, sure = self._guess(model, table, then, heads, earlier)
            # 4. The context may read the guesses on, and the denoiser tells what those before a token say of it.
            prior = self._read_on(heads, guess, text)
            states = self.follow(model.denoiser, table, guess, prior, point.timesteps, context)
            if known is not None:
                # Where the tokens before are known, the context knows more than the denoiser, which trains on fewer blocks.
                states = prior + unknown_before(sure.view(blocks, -1), known).to(states.dtype) * (states - prior)
            if model.config.heads_first and point is earlier:
                by_heads = (point.timesteps == 0).view(blocks, -1)[:, :1, None]
                states = torch.cat([torch.where(by_heads, heads, states[:, :places]), states[:, places:]], dim=1)
        if heads_first:
            states = torch.cat([heads, states[:, places:]], dim=1)
        scores = None
        if not torch.is_grad_enabled() and blocks * chunks * places * len(table) <= SCORES_KEPT:
            scores = nn.functional.linear(states.view(blocks * chunks, places, -1), table).float()
        # The latents are x_t until `_conclude` has predicted the clean ones.
        found = Denoised(x_t, states, scores, text_known=known)
        return self._conclude(None if heads_first else model.recent, x_t, evidence, table, found, labels)

    def conclude(self, model: Any, x_t: torch.Tensor, timesteps: torch.Tensor, found: Denoised) -> Denoised:
        """The last steps of `predict` alone, with what it found and the correction of the prediction before."""
        evidence, table = self.evidence(model, x_t, timesteps), model.context.table(x_t.device)
        return self._conclude(model.recent, x_t, evidence, table, found)

    def _conclude(self, recent, x_t, evidence, table, found, labels=None) -> Denoised:
        """The prediction from states and their scores; guesses know the correction of `found` already."""
        states, scores, correction = found.states, found.scores, None
        corrected, corrected_scores = self._corrected(recent, states, scores, found.correction)
        if recent is not None:
            # 5. Recent tokens correct the states: each token reads the guesses at those just before it.
            rows, known = self.rows(recent, table), corrected.detach()
            guess, _ = self._expect(rows, evidence, known, table.detach(), scores=corrected_scores)
            correction = recent(states, guess.view(*states.shape[:2], -1).to(states.dtype))
            if found.text_known is not None:
                first = correction[:, :1].masked_fill(found.text_known[:, None, None], 0)
                correction = torch.cat([first, correction[:, 1:]], dim=1)
            if scores is not None:
                products = self._keep("products", (table, *recent.up.parameters()), lambda: recent.products(table))
                correction = (correction @ products).view(scores.shape).float()
            corrected, corrected_scores = self._corrected(recent, states, scores, correction)
        # 6. With the evidence they give the posterior of each token, whose expected embeddings make the latent.
        labels, embedding = None if labels is None else labels.flatten(0, 1), evidence.embedding.to(table.dtype)
        means, entropy = self._expect(embedding, evidence, corrected, table, labels, corrected_scores)
        latents = self.write(means).view(x_t.shape)
        return replace(found, clean_latents=latents, correction=correction, cross_entropy=entropy)

    def rows(self, recent, table) -> torch.Tensor:
        """What `recent` reads of each token, (vocab, width)."""
        scale = self._scale(table).to(table.dtype)
        return self._keep("recent", (table, *recent.read.parameters()), lambda: recent.read(table.detach() / scale))

    def _corrected(self, recent, states, scores, correction):
        """States, (chunks, places, state), and scores with the `correction` of a `Denoised`."""
        if correction is not None and scores is None:
            states = states + recent.up(correction)
        elif correction is not None:
            scores = scores + correction
        return states.reshape(-1, len(self.variance), states.shape[-1]), scores

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

    def _read_on(self, heads, guess, text) -> torch.Tensor:
        """The context's states of all tokens of the blocks, (blocks, tokens, state), from which the denoiser starts.

        Those of the heads for the first chunk, zero for the others. With `read_guesses`, the context reads the guesses after
        the text, and its first head gives the states of all tokens but the first.
        """
        tokens = heads.shape[1] * len(guess) // len(heads)
        if text is None or text.read_on is None:
            return nn.functional.pad(heads, (0, 0, 0, tokens - heads.shape[1]))
        soft = guess.reshape(len(heads), tokens, -1)[:, :-1]
        return torch.cat([heads[:, :1], text.read_on(soft.to(heads.dtype)).to(heads.dtype)], dim=1)

    def follow(self, denoiser, table, guess, prior, timesteps, context) -> torch.Tensor:
        """States of the tokens of blocks, (blocks, tokens, state), that follow the text and the guesses before them.

        guess: rows of the table that are expected of each token, (chunks of all blocks, places, state).
        prior: the context's states of these tokens, (blocks, tokens, state), to which the denoiser adds.
        """
        places = guess.shape[1]
        # In units of the table, the length of a guess tells how sure it is.
        read = self.read(guess / self._scale(table).to(guess.dtype)).view(prior.shape)
        before = nn.functional.pad(read[:, :-1], (0, 0, 1, 0))
        times = timesteps if timesteps.dim() == 1 else timesteps.repeat_interleave(places, dim=1)
        return prior + denoiser(prior + before, times, context=context, return_dict=True).clean_latents

    @torch.no_grad()
    def _guess(self, model, table, evidence, heads, earlier) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected row of the table for each token, (chunks of all blocks, places, state), and how sure it is.

        heads: `prior` of the blocks.
        earlier: the prediction before, whose states take the place of the heads'.
        """
        if isinstance(earlier, Denoised) and earlier.states is not None:
            states, scores = self._corrected(model.recent, earlier.states, earlier.scores, earlier.correction)
            return self._expect(table, evidence, states, table, scores=scores, sure=True)
        chunks = len(evidence.fields) // len(heads)
        if chunks == 1:
            return self._expect(table, evidence, heads, table, sure=True)
        guess, sure = self._expect(table, evidence, None, table, sure=True)
        guess[::chunks], sure[::chunks] = self._expect(table, evidence[::chunks], heads, table, sure=True)
        return guess, sure

    def _scale(self, table: torch.Tensor) -> torch.Tensor:
        """Root mean square of the table, a scalar."""
        with torch.no_grad():
            return self._keep("scale", (table,), lambda: table.float().square().mean().sqrt())

    def _expect(self, rows, evidence, states, table, labels=None, scores=None, sure=False) -> tuple[torch.Tensor, Any]:
        """Means of `rows` (vocab, width) under the posteriors, (chunks, places, width), and cross-entropy of the labels.

        With `sure` instead of labels, the second is the probability of the likeliest token at each place, (chunks, places).

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
            probabilities = logits.softmax(dim=-1)
            mean = probabilities.to(rows.dtype) @ rows
            if labels is None:
                return mean, probabilities.amax(dim=-1) if sure else None
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
            return means, torch.cat([surest for _, surest in found]) if sure else None
        return means, torch.stack([nats for _, nats in found]).sum() / (labels != -100).sum().clamp(min=1)


def unknown_before(sure: torch.Tensor, text_known: torch.Tensor) -> torch.Tensor:
    """1 − Π p of the tokens before each in its block, (blocks, tokens, 1): how likely one of them is not what is guessed.

    sure: probability p of the likeliest token at each place, (blocks, tokens).
    text_known: blocks whose text is not hidden, (blocks,) bool; nothing is known in the others.
    """
    known = nn.functional.pad(sure[:, :-1].cumprod(dim=1), (1, 0), value=1.0)
    return (1 - known * text_known[:, None]).unsqueeze(-1)
