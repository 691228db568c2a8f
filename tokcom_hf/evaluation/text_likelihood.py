"""Held-out losses in nats per token, of causal language models and of the auxiliary heads of a TokCom model's context.

The flow has no such loss, because its likelihood of a text has no closed form; it is evaluated by samples.
"""

from typing import Any

import numpy as np
import torch

from ..models.shared_cache_name import CACHE

# Continuations scored per batch.
ROWS_AT_ONCE = 512


@torch.no_grad()
def mean_next_token_loss(model: Any, rows: np.ndarray, most: int = 256, batch_size: int = 16) -> float:
    """Mean next-token cross-entropy in nats, under a causal language model of transformers.

    Args:
        model: the language model.
        rows: (rows, length) ids; the first token of each row is not scored.
        most: maximum number of rows to use, evenly spaced.
        batch_size: rows per forward pass.
    """
    ids = _some(rows, most).to(model.device)
    total = 0.0
    for part in ids.split(batch_size):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(ids)


@torch.no_grad()
def head_losses(model: Any, rows: np.ndarray, most: int = 256, batch_size: int = 16) -> list[float]:
    """Mean cross-entropy in nats at each position of a chunk, under the auxiliary heads of a `TokComModel` with a context.

    The first is the next-token loss, comparable with that of a causal language model. The later heads do not see the chunk's
    earlier tokens.

    Args:
        model: `TokComModel` with a context.
        rows: (rows, length) ids; chunks begin at the first token.
        most: maximum number of rows to use, evenly spaced.
        batch_size: rows per forward pass.

    Returns:
        a list of chunk_size losses.
    """
    size = model.config.vae.chunk_size
    ids = _some(rows, most)
    ids = ids[:, : ids.shape[1] // size * size].to(model.device)
    totals = torch.zeros(size)
    for part in ids.split(batch_size):
        log_probs = head_log_probs(model, model.context(part)[:, :-1:size])
        targets = part.view(*log_probs.shape[:3])
        found = log_probs.gather(-1, targets[..., None])[..., 0]
        totals -= found.mean(dim=(0, 1)).cpu() * (len(part) / len(ids))
    return totals.tolist()


def head_log_probs(model: Any, states: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns log-probabilities (..., chunk_size, vocab) of the auxiliary heads for context states (..., hidden_size)."""
    return (model.context.head_logits(states).float() / temperature).log_softmax(dim=-1)


@torch.no_grad()
def causal_log_probs(
    model: Any, prefixes: torch.Tensor, continuations: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Computes log p of each token of continuations, under a causal language model of transformers.

    Args:
        model: the language model; with its KV cache, each prefix is read once for all its draws.
        prefixes: (rows, prefix length ≥ 1) ids.
        continuations: (rows, draws, length) ids.
        temperature: the logits are divided by it.

    Returns:
        (rows, draws, length) float32 on the CPU, in nats.
    """

    def score(prefix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        draws = tokens.shape[1]
        outputs = model(prefix, use_cache=True, logits_to_keep=1)
        cache = outputs[CACHE]
        cache.batch_repeat_interleave(draws)
        flat = tokens.flatten(0, 1)
        logits = outputs.logits.repeat_interleave(draws, 0)
        if flat.shape[1] > 1:
            logits = torch.cat([logits, model(flat[:, :-1], **{CACHE: cache}).logits], dim=1)
        found = (logits.float() / temperature).log_softmax(-1).gather(-1, flat[..., None])
        return found.view(tokens.shape)

    rows = max(1, ROWS_AT_ONCE // continuations.shape[1])
    parts = zip(prefixes.to(model.device).split(rows), continuations.to(model.device).split(rows))
    return torch.cat([score(*part).cpu() for part in parts])


def _some(rows: np.ndarray, most: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows[:: -(-len(rows) // most)], dtype=np.int64))
