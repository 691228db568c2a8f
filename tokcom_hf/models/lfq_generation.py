"""Keeps text and image tokens apart while generating."""

import torch
from transformers import LogitsProcessor

MODES = ("text", "image", "mixed")


class LFQModeLogitsProcessor(LogitsProcessor):
    """Allows only text ids, only LFQ ids, or text with whole images in it.

    Args:
        mode: `text`: no LFQ id. `image`: only LFQ ids. `mixed`: text, and where an LFQ id appears, exactly
            `num_image_tokens` of them in a row; the next id is text again.
        lfq_token_range: `(start, end)`, end exclusive.
        text_vocab_size: ids from here to `start` are padding rows, never allowed.
        num_image_tokens: tokens of one image in `mixed` mode.
    """

    def __init__(self, mode: str, lfq_token_range: tuple[int, int], text_vocab_size: int, num_image_tokens: int):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens must be >= 1, got {num_image_tokens}.")
        self.mode, self.range, self.text, self.count = mode, lfq_token_range, text_vocab_size, num_image_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        start, end = self.range
        scores = scores.clone()
        scores[:, self.text : start] = -torch.inf
        scores[:, end:] = -torch.inf
        if self.mode == "text":
            scores[:, start:] = -torch.inf
        elif self.mode == "image":
            scores[:, :start] = -torch.inf
        else:
            # Length of the run of LFQ ids that each row ends with.
            inside = ((input_ids >= start) & (input_ids < end)).long()
            run = inside.flip(-1).cumprod(-1).sum(-1)
            unfinished = run % self.count != 0
            scores[unfinished, :start] = -torch.inf
            scores[(run > 0) & ~unfinished, start:] = -torch.inf
        return scores
