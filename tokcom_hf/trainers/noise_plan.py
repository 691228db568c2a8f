"""How much noise each part of a training batch gets: which positions share a time, and the times of single tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models.flow_matching import EARLIEST


@dataclass
class BlockPlan:
    """Which positions of a batch share a time.

    Attributes:
        index: (chunks,) block of each position, never falling.
        clean_first: block 0 is a prompt: clean, and outside the loss.
        context: the denoiser also reads the clean chunks before each block (block-causal attention).
    """

    index: torch.LongTensor
    clean_first: bool = False
    context: bool = False

    @property
    def blocks(self) -> int:
        return int(self.index[-1]) + 1


def plan_blocks(chunks: int, config: Any, generator: torch.Generator) -> BlockPlan:
    """Draws how a batch of `chunks` positions is cut, by the `TokComConfig`."""
    if config.denoiser.attention == "block_causal":
        draw = torch.randint(len(config.block_sizes), (), generator=generator).item()
        size = min(config.block_sizes[int(draw)] or chunks, chunks)
        # Larger blocks begin anywhere, behind a first one of any length, which with single chunks would be lost work.
        first = int(torch.randint(chunks, (), generator=generator).item()) if size > 1 else 0
        position = torch.arange(chunks)
        return BlockPlan(torch.where(position < first, 0, (position - first) // size + int(first > 0)), context=True)
    prefix = 0
    if config.clean_prefix and torch.rand((), generator=generator).item() >= config.prefix_dropout:
        prefix = int(torch.randint(chunks, (), generator=generator).item())
    if config.independent_times:
        index = (torch.arange(chunks) - prefix + int(prefix > 0)).clamp(min=0)
    else:
        index = (torch.arange(chunks) >= prefix).long() if prefix else torch.zeros(chunks, dtype=torch.long)
    return BlockPlan(index, clean_first=prefix > 0)


def draw_token_times(
    times: torch.Tensor,
    config: Any,
    generator: torch.Generator,
    local: Callable[[int, Callable[[int], torch.Tensor]], torch.Tensor] = lambda rows, draw: draw(rows),
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Times of the tokens, spread around those of their chunks; what is clean stays clean.

    Args:
        times: (batch, chunks), 0 noise to 1 clean.
        config: `TokComConfig`; its `token_time_std`, `token_loss_max_time`, `token_cut_rate`, `noise_copies` are read.
        generator: the draws' own.
        local: (rows, draw) → this process's rows of what `draw` returns for the rows of all; one process if not given.

    Returns:
        the times (batch, chunks, chunk size); which tokens the loss asks for, of the same shape (None for all); and the
        chunks' times (batch, chunks): of a chunk cut in two the share of its clean tokens, which is what the sampler
        "commit" says.
    """
    shape, copies, chunk_times = (times.shape[1], config.vae.chunk_size), config.noise_copies, times
    spread = local(len(times), lambda count: torch.randn((count, *shape), generator=generator)).to(times)
    own = torch.sigmoid(torch.logit(times, eps=1e-6).unsqueeze(-1) + config.token_time_std * spread)
    asked = own < config.token_loss_max_time if config.token_loss_max_time < 1 else None
    if config.token_cut_rate > 0:
        rows = len(times) // copies
        draws = local(rows, lambda count: torch.rand((count, shape[0], 2), generator=generator)).to(times)
        draws = draws.repeat_interleave(copies, 0)
        copy = torch.arange(copies, device=times.device).repeat(rows)[:, None, None]
        cut = ((draws[..., :1] * shape[1]).long() + copy) % shape[1]
        is_cut = draws[..., 1:] < config.token_cut_rate
        chunk_times = torch.where(
            (is_cut & (times < 1.0).unsqueeze(-1)).squeeze(-1), cut.squeeze(-1) / shape[1], times
        )
        place = torch.arange(shape[1], device=times.device)
        own = torch.where(is_cut, (place < cut).to(own), own)
        if asked is not None or copies > 1:
            asked = torch.ones_like(own, dtype=torch.bool) if asked is None else asked
            # The other copies ask for the other tokens; of chunks without a cut too, or those would count for more.
            one, all_behind = (asked | is_cut) & (place == cut), torch.where(is_cut, place >= cut, asked)
            asked = one if copies > 1 else all_behind
    own = torch.where((times < 1.0).unsqueeze(-1), own.clamp(EARLIEST, 1 - EARLIEST), times.unsqueeze(-1))
    return own, asked, chunk_times
