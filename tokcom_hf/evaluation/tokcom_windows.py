"""Text of any length as windows of the length that a TokCom model was trained on."""

from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm


def windows(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """A text's ids (tokens,), and the same filled with EOS to whole chunks and cut into the model's training lengths."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if len(ids) == 0:
        raise ValueError("The text makes no token; give more text.")
    chunk = getattr(model, "vae", model).config.chunk_size
    filled = torch.nn.functional.pad(ids, (0, -len(ids) % chunk), value=tokenizer.eos_token_id)
    size = chunk * getattr(model.config, "max_chunks", 256)
    return ids, list(filled.split(size)), len(ids)


def batches(pieces: list[torch.Tensor], batch_size: int, description: str) -> Iterator[torch.Tensor]:
    """Stacks neighbouring windows of one length, `batch_size` at a time; only the last window may be shorter."""
    with tqdm(total=len(pieces), desc=description, unit="window", delay=2) as bar:
        while pieces:
            count = 1
            while count < min(batch_size, len(pieces)) and len(pieces[count]) == len(pieces[0]):
                count += 1
            yield torch.stack(pieces[:count])
            pieces = pieces[count:]
            bar.update(count)
