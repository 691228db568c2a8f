"""How exactly the flow of a TokCom model draws from what its context knows, and a control that does so exactly."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..metrics.token_sampling import sample_tokens
from .text_generation import Sampler
from .text_likelihood import head_log_probs


@dataclass
class ContextSampler(Sampler):
    """Draws token after token from the first head of a `TokComModel`'s context, as a language model does: without a flow.

    Args:
        model: a `TokComModel` with a context.
        batch_size: rows that are drawn together.
    """

    model: Any
    batch_size: int = 256

    @torch.no_grad()
    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        generator, parts = torch.Generator().manual_seed(seed), []
        given = torch.as_tensor(prefixes, dtype=torch.long).repeat_interleave(draws, 0)
        for ids in given.split(self.batch_size):
            ids, cache = ids.to(self.model.device), DynamicCache(config=self.model.config.context)
            state = self.model.context(ids, cache=cache)[:, -1]
            drawn: list[torch.Tensor] = []
            while len(drawn) < length:
                drawn.append(sample_tokens(self.model.context.head_logits(state)[:, 0], generator=generator)[:, None])
                state = self.model.context(drawn[-1], cache=cache)[:, -1]
            parts.append(torch.cat(drawn, dim=1).cpu())
        return torch.cat(parts).numpy().reshape(len(prefixes), draws, length)


@torch.no_grad()
def against_context(
    model: Any, prefixes: np.ndarray, drawn: np.ndarray, batch_size: int = 128
) -> dict[str, list[float] | None]:
    """How drawn tokens differ from draws of the context, which reads the tokens before each.

    A flow whose posteriors were exact would draw each token v of a chunk from the context's own p(v | tokens before); draws
    from p cost on average its entropy, and have on average the probability Σ_v p(v)².

    Args:
        model: a `TokComModel` with a context.
        prefixes: ids (prefixes, prefix length).
        drawn: ids (prefixes, draws, length) that follow them.
        batch_size: rows that are read together.

    Returns:
        of each place, a mean over all draws and its standard error over prefixes, None for a single prefix:
        excess, excess_error: −log p(v) − entropy of p, nats; above 0 the draws are less likely than those of p.
        hits, hits_error: p(v) − Σ p², times 100; below 0 the draws miss what the context is sure of.
    """
    draws, length = drawn.shape[1:]
    ids = np.concatenate([prefixes[:, None].repeat(draws, axis=1), drawn], axis=2).reshape(len(drawn) * draws, -1)
    found = []
    for part in torch.from_numpy(ids).to(model.device).split(batch_size):
        states = model.context(part)[:, -length - 1 : -1]
        log_p = head_log_probs(model, states)[..., 0, :]
        own, p = log_p.gather(-1, part[:, -length:, None])[..., 0], log_p.exp()
        found.append(torch.stack([-own + (p * log_p).sum(dim=-1), 100 * (own.exp() - p.square().sum(dim=-1))]).cpu())
    # (2, prefixes, length)
    of_prefixes = torch.cat(found, dim=1).double().view(2, len(drawn), draws, length).mean(dim=2)
    means, errors = of_prefixes.mean(dim=1).tolist(), [None, None]
    if len(drawn) > 1:
        errors = (of_prefixes.std(dim=1) / len(drawn) ** 0.5).tolist()
    return {"excess": means[0], "excess_error": errors[0], "hits": means[1], "hits_error": errors[1]}
