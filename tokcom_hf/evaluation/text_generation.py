"""A common interface to text generators: TokCom, its heads alone, causal language models, and n-gram models.

A sampler draws whole rows (`rows`) and several independent continuations of given prefixes (`continuations`). Samplers do
not stop at EOS: models are trained on packed rows, where the next document follows, and rows must have equal token counts to
be comparable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache

from ..metrics.text_ngram import KneserNey
from ..metrics.token_sampling import sample_tokens
from ..models.shared_cache_name import CACHE
from .text_likelihood import causal_log_probs, head_log_probs

# Maximum number of chunks drawn from a larger block, if only its first tokens are scored.
MOST_CONTINUED = 16


class Sampler(Protocol):
    """Interface of a text generator to be evaluated."""

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        """Draws rows (count, length) without a prompt; by default, these are continuations of empty prefixes."""
        return self.continuations(np.zeros((count, 0), dtype=np.int64), 1, length, seed)[:, 0]

    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        """Draws independent continuations (prefixes, draws, length) of `prefixes` (prefixes, prefix length)."""
        ...

    def log_probs(self, prefixes: np.ndarray, continuations: np.ndarray) -> np.ndarray | None:
        """Returns log p in nats of each token of `continuations` (prefixes, draws, length), or None if unknown."""
        return None

    def scored_continuations(
        self, prefixes: np.ndarray, targets: np.ndarray, draws: int, length: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draws continuations, and scores them and the true continuations.

        Args:
            prefixes: ids (prefixes, prefix length).
            targets: true continuations (prefixes, target length ≤ `length`).
            draws: number of continuations per prefix.
            length: tokens per continuation.
            seed: seed of the draws.

        Returns:
            ids (prefixes, draws, length); and log p in nats of the tokens of the target and of the first tokens of each
            draw, (prefixes, 1 + draws, target length), or None if the sampler does not know probabilities.
        """
        drawn = self.continuations(prefixes, draws, length, seed)
        compared = np.concatenate([targets[:, None], drawn[..., : targets.shape[1]]], axis=1)
        return drawn, self.log_probs(prefixes, compared)


@dataclass
class TokComSampler(Sampler):
    """Samples from `TokComModel.generate`; a flow gives no probabilities, so `log_probs` returns None.

    Args:
        model: a `TokComModel`.
        settings: arguments of `generate` (num_steps, block_size, sampler, temperature ...); None keeps the model's value.
        batch_size: rows per call of `generate`.
    """

    model: Any
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        chunks = -(-length // self.model.config.vae.chunk_size)
        generator = torch.Generator().manual_seed(seed)
        with _without_end(self.model):
            parts = [
                self.model.generate(num_chunks=chunks, batch_size=size, generator=generator, **self._given())
                for size in _batches(count, self.batch_size)
            ]
        return torch.cat(parts).cpu().numpy()[:, :length]

    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        # At temperature 0 all continuations are equal, and `generate` refuses to draw several.
        copies = 1 if self.settings.get("temperature") == 0 else draws
        settings: dict[str, Any] = {
            "num_generate_chunks": -(-length // self.model.config.vae.chunk_size),
            "generator": torch.Generator().manual_seed(seed),
            "num_return_sequences": copies,
            **self._given(),
        }
        width, given = prefixes.shape[1], torch.as_tensor(prefixes, dtype=torch.long)
        with _without_end(self.model):
            parts = [
                self.model.generate(ids.to(self.model.device), **settings)[:, width : width + length]
                for ids in given.split(max(1, self.batch_size // draws))
            ]
        drawn = torch.cat(parts).cpu().numpy().reshape(len(prefixes), copies, length)
        return drawn.repeat(draws // copies, axis=1)

    def block_tokens(self) -> int:
        """Tokens to draw after a prefix so that the first chunk is drawn together with its block, as in long text.

        This is the number of tokens of a block, but of at most 16 chunks.
        """
        size = self.settings.get("block_size")
        size = self.model.config.block_size if size is None else size
        return min(size or MOST_CONTINUED, MOST_CONTINUED) * self.model.config.vae.chunk_size

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if value is not None}


def tokens_behind_prefix(sampler: Sampler, scored: int) -> int:
    """Returns how many tokens to draw after a prefix if only the first `scored` are used."""
    return max(scored, sampler.block_tokens()) if isinstance(sampler, TokComSampler) else scored


@dataclass
class HeadSampler(Sampler):
    """Samples a chunk's tokens independently from the auxiliary heads of a `TokComModel` with a context, without the flow.

    The difference between a `TokComSampler` and this sampler shows what the flow contributes.
    """

    model: Any
    temperature: float = 1.0
    batch_size: int = 256

    @torch.no_grad()
    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        generator, size = torch.Generator().manual_seed(seed), self.model.config.vae.chunk_size
        parts = []
        for ids in torch.as_tensor(prefixes, dtype=torch.long).split(max(1, self.batch_size // draws)):
            state, cache = self._read(ids.to(self.model.device), draws)
            drawn: list[torch.Tensor] = []
            while len(drawn) * size < length:
                if drawn:
                    state = self.model.context(drawn[-1], cache=cache)[:, -1]
                drawn.append(sample_tokens(self.model.context.head_logits(state), self.temperature, generator))
            parts.append(torch.cat(drawn, dim=1)[:, :length].cpu().view(len(ids), draws, length))
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def log_probs(self, prefixes: np.ndarray, continuations: np.ndarray) -> np.ndarray | None:
        (draws, length), size = continuations.shape[1:], self.model.config.vae.chunk_size
        rows, device, parts = max(1, self.batch_size // draws), self.model.device, []
        given = torch.as_tensor(prefixes, dtype=torch.long).to(device).split(rows)
        wanted = torch.as_tensor(continuations, dtype=torch.long).to(device).split(rows)
        for ids, tokens in zip(given, wanted):
            state, cache = self._read(ids, draws)
            found: list[torch.Tensor] = []
            for chunk in tokens.flatten(0, 1).split(size, dim=1):
                scores = head_log_probs(self.model, state, self.temperature)[:, : chunk.shape[1]]
                found.append(scores.gather(-1, chunk[..., None])[..., 0])
                if len(found) * size < length:
                    state = self.model.context(chunk, cache=cache)[:, -1]
            parts.append(torch.cat(found, dim=1).view(len(ids), draws, length).cpu())
        return torch.cat(parts).numpy()

    def _read(self, ids: torch.Tensor, draws: int) -> tuple[torch.Tensor, Any]:
        """Reads ids (rows, n); returns the last state (rows · draws, hidden_size) and the cache, repeated `draws` times."""
        cache = DynamicCache(config=self.model.config.context)
        states = self.model.context(ids, cache=cache)
        cache.batch_repeat_interleave(draws)
        return states[:, -1].repeat_interleave(draws, 0), cache


@dataclass
class CausalSampler(Sampler):
    """Samples from a causal language model, with a KV cache, from the full distribution at a temperature (0 is greedy)."""

    model: Any
    start_id: int
    temperature: float = 1.0
    batch_size: int = 256

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        start = np.full((count, 1), self.start_id)
        return self.continuations(start, 1, length, seed)[:, 0]

    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        return self._draw(prefixes, None, draws, length, seed)[0]

    def scored_continuations(
        self, prefixes: np.ndarray, targets: np.ndarray, draws: int, length: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if self.temperature == 0:
            return super().scored_continuations(prefixes, targets, draws, length, seed)
        return self._draw(prefixes, targets, draws, length, seed)

    @torch.no_grad()
    def _draw(
        self, prefixes: np.ndarray, targets: np.ndarray | None, draws: int, length: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Computes `scored_continuations`; each prefix is read once, for all its draws and its target."""
        generator = torch.Generator().manual_seed(seed)
        target_length = 0 if targets is None else targets.shape[1]
        copies, parts, scores = draws + (target_length > 0), [], []
        # An explicit decoding loop is as fast as `generate` and accepts a random generator.
        size = max(1, self.batch_size // draws)
        for start in range(0, len(prefixes), size):
            rows = slice(start, start + size)
            ids = torch.as_tensor(prefixes[rows], dtype=torch.long).to(self.model.device)
            outputs = self.model(ids, use_cache=True, logits_to_keep=1)
            cache = outputs[CACHE]
            if copies > 1:
                cache.batch_repeat_interleave(copies)
            logits = outputs.logits[:, -1].repeat_interleave(copies, 0)
            tokens: list[torch.Tensor] = []
            token_log_probs: list[torch.Tensor] = []
            while len(tokens) < length:
                if tokens:
                    outputs = self.model(tokens[-1].flatten()[:, None], use_cache=True, **{CACHE: cache})
                    logits = outputs.logits[:, -1]
                # Copy 0 is the target. After its end it repeats its last token, and its logits are not used.
                by_prefix = logits.unflatten(0, (len(ids), copies))
                drawn = sample_tokens(by_prefix[:, copies - draws :].flatten(0, 1), self.temperature, generator)
                next_tokens = drawn.view(len(ids), draws)
                if targets is not None:
                    place = min(len(tokens), target_length - 1)
                    true = torch.as_tensor(targets[rows, place], dtype=torch.long).to(next_tokens.device)
                    next_tokens = torch.cat([true[:, None], next_tokens], dim=1)
                    if len(tokens) < target_length:
                        log_probs = (by_prefix.float() / self.temperature).log_softmax(-1)
                        token_log_probs.append(log_probs.gather(-1, next_tokens[..., None])[..., 0])
                tokens.append(next_tokens)
            parts.append(torch.stack(tokens, dim=-1)[:, copies - draws :].cpu())
            if token_log_probs:
                scores.append(torch.stack(token_log_probs, dim=-1).cpu())
        return torch.cat(parts).numpy(), torch.cat(scores).numpy() if scores else None

    def log_probs(self, prefixes: np.ndarray, continuations: np.ndarray) -> np.ndarray | None:
        if self.temperature == 0:
            return None
        return causal_log_probs(
            self.model, torch.as_tensor(prefixes), torch.as_tensor(continuations), self.temperature
        ).numpy()


@dataclass
class KneserNeySampler(Sampler):
    """Samples from a Kneser–Ney n-gram model; a model of order 1 gives a unigram sampler."""

    model: KneserNey

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        return self.model.sample(count, length, seed)

    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        repeated = np.repeat(prefixes, draws, axis=0)
        return self.model.sample(len(repeated), length, seed, repeated).reshape(len(prefixes), draws, length)


@dataclass
class ShuffledChunkSampler(Sampler):
    """Control: training chunks in random order, so that each chunk is real text but the sequence is not."""

    train: np.ndarray
    chunk_size: int = 4

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        chunks = -(-length // self.chunk_size)
        usable = len(self.train) // self.chunk_size
        pieces = self.train[: usable * self.chunk_size].reshape(usable, self.chunk_size)
        chosen = np.random.default_rng(seed).integers(0, usable, (count, chunks))
        return pieces[chosen].reshape(count, -1)[:, :length]

    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        return self.rows(len(prefixes) * draws, length, seed).reshape(len(prefixes), draws, length)


def _batches(count: int, size: int) -> Iterator[int]:
    for start in range(0, count, size):
        yield min(size, count - start)


@contextmanager
def _without_end(model: Any) -> Iterator[None]:
    """Removes the EOS ids of a TokCom model inside the block, so that generation does not stop at EOS."""
    configs = (model.config, model.generation_config)
    ends = [config.eos_token_id for config in configs]
    try:
        for config in configs:
            config.eos_token_id = None
        yield
    finally:
        for config, end in zip(configs, ends):
            config.eos_token_id = end
