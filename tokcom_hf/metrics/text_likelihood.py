"""How likely continuations are to a model that writes token after token: what its samples are drawn from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..models.cache_name import CACHE
from .denoising import can_commit, next_token_loss

# Continuations scored at a time.
ROWS_AT_ONCE = 512


def knows_likelihood(model: Any) -> bool:
    """Whether a TokCom or causal language model says how likely each token is given those before it."""
    return model.config.model_type != "tokcom" or can_commit(model)


@torch.no_grad()
def mean_next_token_loss(
    model: Any, rows: np.ndarray, temperature: float = 1.0, most: int = 256, batch_size: int = 16
) -> float:
    """Cross-entropy in nats of each token given all before it, of a TokCom or causal language model that `knows_likelihood`.

    Args:
        rows: (rows, length) ids, of which at most `most` are read, evenly spaced; each row's first token does not count.
    """
    ids = torch.from_numpy(np.ascontiguousarray(rows[:: -(-len(rows) // most)], dtype=np.int64))
    total = 0.0
    for part in ids.to(model.device).split(batch_size):
        if model.config.model_type == "tokcom":
            loss = next_token_loss(model, part, torch.ones_like(part), temperature)
        else:
            logits = model(part).logits[:, :-1].float() / temperature
            loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
        total += loss * len(part)
    return total / len(ids)


@torch.no_grad()
def tokcom_log_probs(
    model: Any, prefixes: torch.Tensor, continuations: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p of each token given all before it, as `generate(sampler="commit", block_size=1)` draws them.

    Args:
        model: `TokComModel` that `metrics.denoising.can_commit`.
        prefixes: (rows, prefix length), a multiple of the chunk size.
        continuations: (rows, draws, length); the prefix is read once for all its draws.
        temperature: `posterior_temperature`.

    Returns:
        (rows, draws, length) float32 on the CPU, nats.

    Raises:
        ValueError: the prefix is not made of whole chunks.
    """
    chunk, device = model.config.vae.chunk_size, model.device
    if prefixes.shape[1] % chunk or not prefixes.shape[1]:
        raise ValueError(f"The prefix must be made of whole chunks of {chunk} tokens, got {prefixes.shape[1]} tokens.")
    head, places = model.token_head(), torch.arange(chunk, device=device)
    omni = torch.tensor([model.config.vae.omni_token_id], device=device)

    def score(prefix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        draws, length = tokens.shape[1:]
        clean = model.standardize(model.encode(prefix))
        past = model.finish(clean).repeated(draws)
        previous, finished, columns = clean[:, -1:].repeat_interleave(draws, 0), clean.shape[1], []
        for part in torch.nn.functional.pad(tokens.flatten(0, 1), (0, -length % chunk)).split(chunk, dim=1):
            latent = model.standardize(model.encode(part))
            for place in range(chunk):
                times = (places < place).to(clean)[None, None]
                hidden = model(
                    latent * model.per_entry(times), torch.full((1,), place / chunk, device=device), token_times=times,
                    past_key_values=past, position_offset=finished, previous=previous, only_tokens=True,
                    token_mask=(places == place).expand(len(part), 1, chunk), token_head=head,
                ).token_hidden  # fmt: skip
                logits = torch.nn.functional.linear(hidden, head).float().index_fill(-1, omni, -torch.inf)
                columns.append((logits / temperature).log_softmax(-1).gather(-1, part[:, place, None]))
            if len(columns) < length:
                past, previous, finished = model.finish(latent, past, finished), latent, finished + 1
        return torch.cat(columns, dim=1)[:, :length].view(len(prefix), draws, length)

    return _in_parts(score, prefixes.to(device), continuations.to(device))


@torch.no_grad()
def causal_log_probs(
    model: Any, prefixes: torch.Tensor, continuations: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """The same of a causal language model of transformers with a KV cache; any prefix length of at least one token."""

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

    return _in_parts(score, prefixes.to(model.device), continuations.to(model.device))


def _in_parts(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prefixes: torch.Tensor,
    continuations: torch.Tensor,
) -> torch.Tensor:
    rows = max(1, ROWS_AT_ONCE // continuations.shape[1])
    return torch.cat([score(*part).cpu() for part in zip(prefixes.split(rows), continuations.split(rows))])
