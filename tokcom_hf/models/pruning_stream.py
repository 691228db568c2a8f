"""Removal of tokens from the hidden states, masks, positions and KV cache of a decoder between two layers.

In later layers removed tokens have no query, no key and no cache entry; the others keep their rotary positions. Rows that
keep fewer tokens than others are padded at the end.
"""

from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from .pruning_report import PromptRecord
from .shared_cache_name import CACHE


@dataclass
class Stream:
    """The tokens that a decoder layer sees.

    Attributes:
        hidden: `(batch, length, hidden)`.
        mask: bool `(batch, length)`, False on padding.
        positions: rotary positions `(batch, length)` or `(3, batch, length)`.
        vision: bool `(batch, length)`, True on vision tokens.
        question: bool `(batch, length)`, True on the text that the heads read: no vision, no padding, no answer.
        index: `(batch, length)`, each token's place in the input.
        images: `(batch, length)`, number of the token's image within its row, -1 on text.
        removed: whether any token has been removed.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    vision: torch.Tensor
    question: torch.Tensor
    index: torch.Tensor
    images: torch.Tensor
    removed: bool = False

    def keep(self, keep: torch.Tensor) -> "Stream":
        """The stream without the tokens where `keep`, bool `(batch, length)`, is False; this stream if all are kept."""
        keep = keep & self.mask
        counts = keep.sum(-1)
        # Both numbers are read in one transfer from the device.
        length, dropped = torch.stack([counts.max(), (self.mask & ~keep).sum()]).tolist()
        if not dropped:
            return self
        # A stable sort puts kept tokens first, in their order.
        order = torch.argsort((~keep).int(), dim=-1, stable=True)[:, :length]
        pick = lambda tensor: tensor.gather(-1, order)  # noqa: E731
        positions = self.positions.gather(-1, order.expand(*self.positions.shape[:-1], length))
        alive = torch.arange(length, device=keep.device) < counts[:, None]
        return Stream(
            hidden=self.hidden.gather(1, order[..., None].expand(-1, -1, self.hidden.shape[-1])),
            mask=alive,
            positions=positions,
            vision=pick(self.vision) & alive,
            question=pick(self.question) & alive,
            index=pick(self.index),
            images=pick(self.images).masked_fill(~alive, -1),
            removed=True,
        )

    def repeat(self, times: int) -> "Stream":
        """The stream with every row `times` times, for beam search."""
        if times == 1:
            return self
        rows = {name: value for name, value in vars(self).items() if name not in ("positions", "removed")}
        repeated = {name: value.repeat_interleave(times, 0) for name, value in rows.items()}
        return replace(self, **repeated, positions=self.positions.repeat_interleave(times, -2))

    def restore(self, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """`hidden` at the places of the input, `(batch, length, hidden)`, zero where tokens were removed."""
        if not self.removed:
            return hidden
        full = hidden.new_zeros(hidden.shape[0], length, hidden.shape[-1])
        alive = self.mask[..., None]
        # Adding is safe: padding slots share their index with removed tokens only, and are zeroed.
        return full.scatter_add(1, self.index[..., None].expand_as(hidden), hidden * alive)


@dataclass
class Prompt:
    """A prompt after stage 1, ready for the first decoder layer.

    Attributes:
        stream: the tokens of the prompt.
        record: pruning mode and numbers of tokens before pruning, for `token_report`.
        merged: weights and losses of the merger by name; empty if no merger ran.
    """

    stream: Stream
    record: PromptRecord
    merged: dict

    def repeat(self, rows: int) -> "Prompt":
        """The prompt with every row repeated so that there are `rows`, for beam search."""
        return replace(self, stream=self.stream.repeat(rows // len(self.stream.hidden)))


@dataclass
class Segment:
    """The padding mask `(batch, keys)` and, in soft mode, the bias of the cached keys from layer `start` on."""

    start: int
    mask: torch.Tensor
    bias: torch.Tensor | None = None


class PrunedCache(DynamicCache):
    """A KV cache whose layers hold different tokens, with the masks that decoding needs.

    Attributes:
        prompt: the prepared prompt, from `generate` to the first forward pass.
        mode: the pruning mode of the prompt that the cache holds.
        record: the record of that prompt, for `token_report`.
        segments: runs of layers that hold the same tokens.
        next_position: `(batch,)`, rotary position of the next new token.
    """

    def __init__(self):
        # Without a configuration no layer gets a sliding cache, which `check_window` makes unnecessary.
        super().__init__()
        self.prompt: Prompt | None = None
        self.mode: str | None = None
        self.record: PromptRecord | None = None
        self.segments: list[Segment] = []
        self.next_position: torch.Tensor | None = None

    def take_prompt(self, rows: int) -> Prompt | None:
        """Takes the prepared prompt out of the cache, repeated to `rows` rows; None if there is no prompt."""
        prompt, self.prompt = self.prompt, None
        return None if prompt is None else prompt.repeat(rows)

    def _select(self, choose) -> None:
        """Applies `choose`, a selection of rows, to masks, biases and positions."""
        for segment in self.segments:
            segment.mask = choose(segment.mask)
            segment.bias = None if segment.bias is None else choose(segment.bias)
        if self.next_position is not None:
            self.next_position = choose(self.next_position)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._select(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(lambda tensor: tensor[indices])

    @property
    def is_croppable(self) -> bool:
        """False: assisted decoding, which crops caches, is not possible."""
        return False

    def crop(self, *args, **kwargs):
        raise ValueError("A pruned cache cannot be cropped; assisted decoding is not supported with token pruning.")

    def extend(self, mask: torch.Tensor) -> None:
        """Appends new tokens to every mask; `mask` `(batch, new)` is False on padding among them."""
        for segment in self.segments:
            segment.mask = torch.cat([segment.mask, mask.to(segment.mask.device)], dim=-1)
            if segment.bias is not None:
                zeros = torch.zeros_like(segment.bias[:, :1]).expand(-1, mask.shape[1])
                segment.bias = torch.cat([segment.bias, zeros], dim=-1)


def cache_for(cache, use_cache: bool | None) -> PrunedCache | None:
    """The cache of a call: the given one; a new one with `use_cache` and no given one; else None.

    Raises:
        TypeError: `cache` is of another class, whose layers must all hold the same tokens.
    """
    if cache is None and use_cache:
        return PrunedCache()
    if cache is not None and not isinstance(cache, PrunedCache):
        raise TypeError(f"PrunedVLM needs a PrunedCache (or use_cache=True), got {type(cache).__name__}.")
    return cache


def attention_mask(
    config, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None, cache, layer: int
) -> torch.Tensor | None:
    """The attention mask of a decoder layer: causal, without padding, plus `bias` on the key columns.

    A token with soft mask m gets log(m) on its key column, so that m → 0 converges to the removal of the token. (A factor on
    its hidden state would have no effect: RMSNorm cancels it.) The diagonal has no bias: a token always sees itself.

    Args:
        config: the text config (its attention implementation decides the mask's form).
        hidden: `(batch, queries, hidden)`.
        mask: bool `(batch, keys)`.
        bias: `(batch, keys)` of log keep probabilities, or None.
        cache: the KV cache, or None.
        layer: first of the layers that use this mask.
    """
    built = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=mask,
        position_ids=None,
        layer_idx=layer,
        allow_is_causal_skip=bias is None,
        **{CACHE: cache},
    )
    if bias is None:
        return built  # type: ignore[return-value]
    if not torch.is_tensor(built) or built.dim() != 4:
        raise ValueError(f"Soft pruning needs sdpa or eager attention, got {config._attn_implementation!r}.")
    if built.dtype == torch.bool:
        lowest = torch.finfo(hidden.dtype).min
        built = torch.zeros_like(built, dtype=hidden.dtype).masked_fill(~built, lowest)
    queries, keys = built.shape[-2:]
    own = torch.eye(queries, keys, dtype=torch.bool, device=built.device) if queries == keys else None
    columns = bias[:, None, None, :].to(built.dtype).expand(-1, -1, queries, -1)
    columns = columns if own is None else columns.masked_fill(own, 0.0)
    return (built + columns).clamp(min=torch.finfo(hidden.dtype).min)
