"""Blocks and losses of `TokComModel.forward`: how a row is cut into blocks, and the terms of the loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .shared_cross_entropy import chunked_cross_entropy
from .tokcom_context_encoder import states_before
from .tokcom_denoise import PathPoint
from .tokcom_flow_matching import interpolate, velocity_weight

# Weight of the heads of later tokens beside that of the next token, from whose loss the context learns most.
LATER_WEIGHT = 0.2
# Every second block is told its tokens, which leaves compute for the context.
TOLD_STRIDE = 2


@dataclass
class TokComOutput(ModelOutput):
    """Output of `TokComModel.forward`; losses are scalars.

    loss: mse_weight · flow_loss + cross_entropy_weight · cross_entropy_loss + head_weight · (next_token_loss +
        later_token_loss / 5) + told_weight · told_loss.
    flow_loss: squared error of the velocity, |x̂1 − x1|² / max(1 − t, 0.05)², per latent dimension.
    mse_loss: squared error of the clean latents, |x̂1 − x1|², per latent dimension; reported only.
    cross_entropy_loss: nats per token, of the decoder on the predicted latents or of the `TokenPosterior`; None with
        cross_entropy_weight=0.
    next_token_loss, later_token_loss: nats per token of the context's heads, for the next token and, as a mean, for the
        later tokens of a chunk; None without a context.
    told_loss: nats per token of the denoiser that is told the tokens before each; None with told_weight=0.
    clean_latents: predicted x̂1 in the flow's space, (rows, blocks, chunks, latent).
    """

    loss: torch.Tensor | None = None
    flow_loss: torch.Tensor | None = None
    mse_loss: torch.Tensor | None = None
    cross_entropy_loss: torch.Tensor | None = None
    next_token_loss: torch.Tensor | None = None
    later_token_loss: torch.Tensor | None = None
    told_loss: torch.Tensor | None = None
    clean_latents: torch.Tensor | None = None


def block_shape(
    config: Any, length: int, offset: int = 0, block_size: int = 0, draw_shift: int = 0, block_stride: int = 1
) -> tuple[int, int, int]:
    """Shape (blocks, chunks, latent) of the blocks of a row of `length` tokens, cut from token `offset` on.

    The number of blocks counts every noise draw.

    Args:
        config: `TokComConfig`.
        block_size: chunks per block, 0 for all.
        draw_shift: tokens by which the blocks of each noise draw start after those of the draw before.
        block_stride: blocks from the start of one to that of the next.

    Raises:
        ValueError: no whole block fits, a stride below 1, a model without a context got an offset or a block size, or one
            with a single noise draw got a shift.
    """
    draws = copies_of_blocks(config)
    if draw_shift and draws == 1:
        raise ValueError(
            f"draw_shift={draw_shift} moves all noise draws but the first; this model has noise_draws={config.noise_draws}."
        )
    if block_stride < 1:
        raise ValueError(f"block_stride must be at least 1, got {block_stride}.")
    chunk, last = config.vae.chunk_size, offset + (draws - 1) * draw_shift
    size = block_size or (length - last) // chunk
    if config.context is None and (offset or size * chunk != length or block_stride > 1):
        raise ValueError(
            f"Without a context the whole row is one block: its length must be a multiple of {chunk} (got {length}), offset "
            f"and block_size 0, and block_stride 1 (got {offset}, {block_size} and {block_stride})."
        )
    blocks = (length - last) // (size * chunk) if size > 0 else 0
    if blocks < 1 or min(offset, draw_shift) < 0:
        raise ValueError(f"No block of {size} chunks of {chunk} tokens fits after {last} of {length} tokens.")
    # Rounded up, because the last block needs no room behind it.
    return draws * -(-blocks // block_stride), size, config.vae.latent_size


def copies_of_blocks(config: Any) -> int:
    """Noise draws of a block in one `forward`; a fraction of a draw is one, of the blocks that `stride_of_blocks` leaves."""
    return max(1, int(config.noise_draws))


def stride_of_blocks(config: Any) -> int:
    """`block_stride` in training: n where `noise_draws` is 1/n."""
    return max(1, round(1 / config.noise_draws))


def block_starts(
    config: Any, shape: tuple[int, ...], offset: int = 0, draw_shift: int = 0, block_stride: int = 1
) -> torch.Tensor:
    """Index of the first token of each block, (draws, blocks of a draw); arguments and `shape` as in `block_shape`."""
    draws, span = copies_of_blocks(config), block_stride * shape[1] * config.vae.chunk_size
    return offset + draw_shift * torch.arange(draws)[:, None] + span * torch.arange(shape[0] // draws)


def check_shapes(config: Any, input_ids: torch.Tensor, shape: tuple[int, ...], **given: torch.Tensor | None) -> None:
    """Raises ValueError where an argument of `TokComModel.forward` does not fit the blocks of its rows.

    shape: shape of these blocks, (rows, blocks, chunks, latent).
    given: the arguments by name.
    """
    if given["call_times"] is not None and not config.token_posterior:
        raise ValueError(
            "call_times are for models with token_posterior, whose evidence goes on without the denoiser."
        )
    if given["context_mask"] is not None and config.context is None:
        raise ValueError("context_mask hides the context from blocks; this model has none.")
    whole_rows = (shape[0], input_ids.shape[1] // config.vae.chunk_size, shape[3])
    fitting: dict[str, list[tuple[int, ...]]] = {
        "attention_mask": [tuple(input_ids.shape)],
        "latents": [whole_rows],
        "noise": [shape],
        "timesteps": [shape[:2], shape[:3]],
        "call_times": [shape[:2], shape[:3]],
        "context_mask": [shape[:2]],
    }
    for name, value in given.items():
        if value is not None and tuple(value.shape) not in fitting[name]:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, fitting[name]))} for input_ids {tuple(input_ids.shape)}, of which "
                f"{shape[1]} blocks of {shape[2]} chunks are made; got {tuple(value.shape)}."
            )


@dataclass
class Blocks:
    """The blocks of a batch of rows, repeated for each noise draw.

    x1: clean latents in the flow's space, (rows, blocks, chunks, latent).
    labels: tokens, (rows, blocks, chunks, chunk_size), -100 for padding.
    starts: index of the first token of each block, (draws, blocks of a draw).
    padded: whether there is an attention mask.
    """

    x1: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor
    padded: bool

    def real(self) -> torch.Tensor:
        """Which chunks hold a token, (rows, blocks, chunks) bool."""
        return (self.labels >= 0).any(dim=-1)

    def chunk_mask(self) -> torch.Tensor | None:
        """Chunks that may be attended to, (rows · blocks, chunks); None: all. In a block of padding alone it is all, too."""
        if not self.padded or self.x1.shape[2] == 1:
            return None
        real = self.real()
        return (real | ~real.any(dim=-1, keepdim=True)).flatten(0, 1).long()

    def mixed(self, noise: torch.Tensor, timesteps: torch.Tensor) -> PathPoint:
        """x_t = (1 − t) · x0 + t · x1 of all rows as one batch, from noise x0 like x1 and times t (rows, blocks, …)."""
        timesteps = timesteps.to(self.x1.device, torch.float32)
        x_t = interpolate(noise.to(self.x1), self.x1, timesteps.to(self.x1.dtype))
        return PathPoint(x_t.flatten(0, 1), timesteps.flatten(0, 1))


def cut_blocks(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    latents: torch.Tensor | None,
    shape: tuple[int, ...],
    offset: int,
    draw_shift: int,
    block_stride: int,
) -> Blocks:
    """Blocks of `shape` (rows, blocks, chunks, latent), which `block_shape` gives for this offset and shift."""
    if latents is not None and (offset or draw_shift or block_stride > 1):
        raise ValueError(
            f"latents must be those of whole rows, from token 0 on; got offset={offset}, draw_shift={draw_shift} and "
            f"block_stride={block_stride} with them."
        )
    rows, draws, chunk = len(input_ids), copies_of_blocks(model.config), model.config.vae.chunk_size
    starts = block_starts(model.config, shape[1:], offset, draw_shift, block_stride).to(input_ids.device)
    tokens = (starts[..., None] + torch.arange(shape[2] * chunk, device=starts.device)).flatten()
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    with torch.no_grad():
        if latents is not None:
            x1 = latents[:, : shape[1] * shape[2] // draws].repeat(1, draws, 1)
        elif draw_shift == 0:
            # All draws are of the same blocks, which are encoded once.
            x1 = model.encode(input_ids[:, tokens[: len(tokens) // draws]]).repeat(1, draws, 1)
        else:
            x1 = model.encode(input_ids[:, tokens])
        x1 = model.standardize(x1).view(shape)
    return Blocks(x1, labels[:, tokens].view(rows, *shape[1:3], chunk), starts, attention_mask is not None)


def add_flow_losses(model: Any, output: Any, blocks: Blocks, t: torch.Tensor) -> None:
    """Adds the losses of the flow and of the tokens to a `TokComOutput` that has `clean_latents`.

    The cross-entropy of a `TokenPosterior` is in the output already; without one, it is that of the frozen decoder.

    t: times (rows, blocks, chunks); chunks at t = 1 are known and have no loss.
    """
    config, counted = model.config, blocks.real() & (t < 1.0)
    count = counted.sum().clamp(min=1)
    error = ((output.clean_latents.float() - blocks.x1.float()) ** 2).mean(dim=-1) * counted
    output.mse_loss = error.sum() / count
    output.flow_loss = (velocity_weight(t) * error).sum() / count
    output.loss = config.mse_weight * output.flow_loss
    if config.cross_entropy_weight > 0 and output.cross_entropy_loss is None:
        # If no chunk counts, one chunk stays, without a label, so that every parameter has a (zero) gradient.
        kept = counted.clone()
        kept.view(-1)[0] |= ~counted.any()
        labels = blocks.labels.masked_fill(~counted.unsqueeze(-1), -100)[kept]
        latents = model.unstandardize(output.clean_latents)[kept].to(model.vae.lm_head.weight.dtype)
        output.cross_entropy_loss = model.vae.cross_entropy(model.vae.decode_hidden(latents), labels)
    if config.cross_entropy_weight > 0:
        output.loss = output.loss + config.cross_entropy_weight * output.cross_entropy_loss


def add_text_losses(
    model: Any,
    output: Any,
    states: torch.Tensor | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    starts: torch.Tensor,
    t: torch.Tensor,
) -> None:
    """Adds the losses that need no noise: those of the context's heads, and that of the denoiser which is told tokens.

    states: states of the context, (rows, 1 + length, hidden); a model without a context has none of these losses.
    starts: index of the first token of each block, (blocks,).
    t: times of the blocks, (rows, blocks, chunks).
    """
    if states is None:
        return
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    chunk, size, weight = model.config.vae.chunk_size, states.shape[-1], model.config.head_weight
    # The next token at every state, and the later ones of a chunk at the starts of blocks.
    output.next_token_loss = model.context.cross_entropy(states[:, :-1].reshape(-1, size), labels.reshape(-1, 1), 0, 1)
    output.loss = output.loss + weight * output.next_token_loss
    if chunk > 1:
        later = labels[:, starts[:, None] + torch.arange(1, chunk, device=starts.device)]
        output.later_token_loss = model.context.cross_entropy(
            states[:, starts].reshape(-1, size), later.reshape(-1, chunk - 1), 1, chunk
        )
        output.loss = output.loss + LATER_WEIGHT * weight * output.later_token_loss
    if model.config.told_weight > 0:
        output.told_loss = told_loss(model, states, labels, int(starts[0]), t)
        output.loss = output.loss + model.config.told_weight * output.told_loss


def told_loss(model: Any, states: torch.Tensor, labels: torch.Tensor, first: int, t: torch.Tensor) -> torch.Tensor:
    """Nats per token of the denoiser that reads the true tokens before each token of a block, as a language model does.

    states, t: as in `add_text_losses`; a told block takes the time of a block of the flow at about its place.
    labels: tokens of the rows, (rows, length), -100 for padding.
    first: index of the first token of the first block.
    """
    chunk, posterior, recent = model.config.vae.chunk_size, model.posterior, model.recent
    span = t.shape[2] * chunk
    stride = TOLD_STRIDE if recent is None else 1
    starts = torch.arange(first, labels.shape[1] - span + 1, stride * span, device=labels.device)
    tokens = labels[:, starts[:, None] + torch.arange(span, device=labels.device)].flatten(0, 1)
    times = t[:, torch.arange(len(starts), device=t.device) * t.shape[1] // len(starts), 0].flatten()
    context, table = states_before(states, starts), model.context.table(states.device)
    heads, ids = posterior.prior(model, context, len(context)), tokens.clamp(min=0)
    told = nn.functional.pad(heads, (0, 0, 0, span - chunk))
    if not model.config.read_guesses:
        # The denoiser is told every second block. Recent tokens are told all of them, the others as before its first call.
        part = slice(None, None, TOLD_STRIDE // stride)
        known = nn.functional.embedding(ids[part], table.detach()).view(-1, chunk, table.shape[1])
        follows = posterior.follow(model.denoiser, table, known, told[part], times[part], context[part])
        told = told.index_copy(0, torch.arange(len(told), device=told.device)[part], follows.to(told.dtype))
    if recent is not None:
        told = told + recent.up(recent(told, nn.functional.embedding(ids, posterior.rows(recent, table))))
    return chunked_cross_entropy(told.flatten(0, 1), table, tokens.flatten())
