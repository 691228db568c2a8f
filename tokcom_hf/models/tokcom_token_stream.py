"""Passes generated tokens to a streamer of transformers (TextStreamer, TextIteratorStreamer …) block by block."""

from typing import Any

import torch

from .tokcom_generation_settings import GenerationSettings


class TokenStream:
    """Puts the prompt first, then one token of every row at a time, as transformers' own `generate` does.

    After the end of a row its tokens are `fill_id`; after the end of all rows nothing is put. With None as the streamer
    nothing happens.
    """

    def __init__(self, streamer: Any, settings: GenerationSettings):
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(
                f"A streamer needs the methods put and end, as TextStreamer; got {type(streamer).__name__}."
            )
        self.streamer, self.settings = streamer, settings
        self.left = settings.new_tokens
        self.ended: torch.Tensor | None = None

    def start(self, prompt: torch.Tensor) -> None:
        """Puts the prompt (rows, length), even of length 0, because a streamer may be told to skip its first input."""
        self.ended = torch.zeros(len(prompt), dtype=torch.bool)
        if self.streamer is not None:
            self.streamer.put(prompt.cpu())

    def put(self, ids: torch.Tensor) -> None:
        """Puts the ids (rows, tokens) of the next finished block."""
        if self.streamer is None or self.ended is None:
            return
        end = torch.tensor(self.settings.eos_token_ids, dtype=torch.long)
        for column in ids.cpu().unbind(1):
            if self.left == 0 or bool(self.ended.all()):
                return
            column = column.masked_fill(self.ended, self.settings.fill_id)
            self.ended = self.ended | torch.isin(column, end)
            self.left -= 1
            self.streamer.put(column)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
