"""Cuts text of any length into windows of a TokCom model's training length."""

from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm


def windows(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Tokenizes a text and cuts it into windows of the model's training length.

    Returns:
        ids (tokens,); the windows, of which the last is padded with EOS to whole chunks; and the number of tokens.

    Raises:
        ValueError: the text has no token.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if len(ids) == 0:
        raise ValueError("The text has no tokens; give more text.")
    chunk = getattr(model, "vae", model).config.chunk_size
    filled = torch.nn.functional.pad(ids, (0, -len(ids) % chunk), value=tokenizer.eos_token_id)
    size = chunk * getattr(model.config, "max_chunks", 256)
    return ids, list(filled.split(size)), len(ids)


def batches(pieces: list[torch.Tensor], batch_size: int, description: str) -> Iterator[torch.Tensor]:
    """Yields batches of at most `batch_size` neighbouring windows of equal length; only the last window may be shorter."""
    with tqdm(total=len(pieces), desc=description, unit="window", delay=2) as bar:
        while pieces:
            count = 1
            while count < min(batch_size, len(pieces)) and len(pieces[count]) == len(pieces[0]):
                count += 1
            yield torch.stack(pieces[:count])
            pieces = pieces[count:]
            bar.update(count)
