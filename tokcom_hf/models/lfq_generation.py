"""Generation of text and images with an `LFQExpandedModel`: the modes as a logits processor, and options of `generate`."""

import torch
from transformers import LogitsProcessor

from .shared_tensor_checks import check_ids
from .shared_wrapped_base import check_generation_config

MODES = ("text", "image", "mixed")


class LFQModeLogitsProcessor(LogitsProcessor):
    """Allows only text ids, only LFQ ids, or text with whole images in it.

    Args:
        mode: `text`: no LFQ id. `image`: only LFQ ids. `mixed`: text, and runs of exactly `num_image_tokens` LFQ ids with
            text between them.
        lfq_token_range: `(start, end)`, end exclusive.
        text_vocab_size: ids from here to `start` are padding rows, which are never allowed.
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
        scores = scores.clone()  # type: ignore[assignment]  # clone is annotated to give a plain Tensor
        scores[:, self.text : start] = -torch.inf
        scores[:, end:] = -torch.inf
        if self.mode == "text":
            scores[:, start:] = -torch.inf
        elif self.mode == "image":
            scores[:, :start] = -torch.inf
        else:
            # Number of LFQ ids at the end of each row.
            inside = ((input_ids >= start) & (input_ids < end)).long()
            run = inside.flip(-1).cumprod(-1).sum(-1)
            unfinished = run % self.count != 0
            scores[unfinished, :start] = -torch.inf
            scores[(run > 0) & ~unfinished, start:] = -torch.inf
        return scores


def generation_options(
    model, inputs: torch.Tensor | None, mode: str | None, num_image_tokens: int, logits_processor, options: dict
) -> dict:
    """Keywords of the base model's `generate`; arguments and errors are those of `LFQExpandedModel.generate`."""
    options = dict(options)
    processors = list(logits_processor or [])
    if mode is not None:
        start, _ = model.lfq_token_range
        text = model.config.text_vocab_size or start
        # First of all processors: those that warp or sample logits must see only ids that may be drawn.
        processors.insert(0, LFQModeLogitsProcessor(mode, model.lfq_token_range, text, num_image_tokens))
    if mode == "image":
        for name in ("max_new_tokens", "min_new_tokens", "max_length", "min_length"):
            if options.get(name) not in (None, num_image_tokens):
                raise ValueError(f"mode='image' generates exactly {num_image_tokens=} tokens; leave {name} out.")
        options |= {"max_new_tokens": num_image_tokens, "min_new_tokens": num_image_tokens, "max_length": None}
    if inputs is not None and options.get("input_ids") is not None:
        raise ValueError("inputs and input_ids are two names of one argument; give one of them.")
    if inputs is not None:
        options["input_ids"] = inputs
    if options.get("input_ids") is not None:
        check_ids(options["input_ids"])
    check_generation_config(options.get("generation_config"))
    return options | {"logits_processor": processors or None}
