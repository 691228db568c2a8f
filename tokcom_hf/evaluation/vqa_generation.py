"""Generates greedy answers of a VLM to VQA rows with `model.generate`, as a user would."""

from collections.abc import Callable

import torch


@torch.no_grad()
def generate_answers(
    model,
    collator: Callable,
    rows,
    batch_size: int = 50,
    max_new_tokens: int = 4,
    on_batch: Callable[[dict], None] | None = None,
    **options,
) -> list[str]:
    """Generates greedy answers to the first question of every row.

    Args:
        model: model with a method `generate(**inputs)`.
        collator: a `VQACollator` with `answers=False` (left padding).
        rows: VQA rows.
        batch_size: rows per batch.
        max_new_tokens: maximum tokens of an answer.
        on_batch: called after each batch with its inputs, for example to collect token reports.
        options: further arguments of `generate`, for example `pruning_mode`.

    Returns:
        the answers, without special tokens and outer white space.
    """
    tokenizer = collator.processor.tokenizer  # type: ignore[attr-defined]
    was_training = model.training
    model.eval()
    answers: list[str] = []
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {name: value.to(device) for name, value in batch.items()}
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, **options)
        new = ids[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        if on_batch is not None:
            on_batch(batch)
    model.train(was_training)
    return answers
