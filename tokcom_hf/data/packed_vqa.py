"""Packs all questions about an image into one sequence; block attention masks the questions from each other.

The image is encoded once for all its questions. Each question has the positions and the mask that it would have alone, so
a model trained on packed questions sees single questions exactly as in training.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .vqa_collator import IGNORED, require_placeholder


@dataclass
class PackedVQACollator:
    """Turns rows of `tokcom_hf.data.vqa` into model inputs with labels on the answers only.

    Args:
        processor: the VLM's processor.
        prompt: text before the answer; must begin with `<image>`, which stands for the processor's image token.
            `{question}` is replaced, other braces stay as they are.

    Returns (when called):
        `input_ids`, `labels`, `position_ids` `(batch, length)`, `attention_mask` `(batch, 1, length, length)` (True
        where the query may attend to the key) and the processor's other outputs, such as `pixel_values`.

    Raises:
        ValueError: the prompt does not begin with `<image>` or lacks `{question}`; or (when called) a row has no image, or
            the images have different numbers of tokens.
    """

    processor: Any
    prompt: str = "<image> {question}"
    _cache: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not self.prompt.startswith("<image>"):
            raise ValueError(
                f"Packed questions share the image in front, so prompt must begin with <image>, got {self.prompt!r}."
            )
        require_placeholder("prompt", self.prompt, "{question}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any(row["image"] is None for row in rows):
            raise ValueError(
                "Packed questions share an image, but a row has none; use VQACollator for text-only rows."
            )
        image_token = getattr(self.processor, "image_token", "<image>")
        images = [row["image"] for row in rows]
        inputs = dict(self.processor(text=[image_token] * len(rows), images=images, return_tensors="pt", padding=True))
        if not inputs.pop("attention_mask").all():
            raise ValueError("Packed questions need images with the same number of tokens; resize them first.")
        prefix = inputs.pop("input_ids")
        start = prefix.shape[1]
        packed = [self._blocks(row) for row in rows]
        length = max(sum(len(question) + len(answer) for question, answer in blocks) for blocks in packed)
        shape = (len(rows), length)
        ids = torch.full(shape, self.processor.tokenizer.pad_token_id or 0)
        labels = torch.full(shape, IGNORED)
        block = torch.full(shape, -1)
        positions = torch.zeros(shape, dtype=torch.long)
        for row, blocks in enumerate(packed):
            at = 0
            for number, (question, answer) in enumerate(blocks):
                end = at + len(question) + len(answer)
                ids[row, at:end] = torch.tensor(question + answer)
                labels[row, at + len(question) : end] = torch.tensor(answer)
                block[row, at:end] = number
                positions[row, at:end] = torch.arange(start, start + end - at)
                at = end
        image_block = torch.full((len(rows), start), -2)
        inputs["input_ids"] = torch.cat([prefix, ids], 1)
        inputs["labels"] = torch.cat([torch.full_like(prefix, IGNORED), labels], 1)
        inputs["position_ids"] = torch.cat([torch.arange(start).expand(len(rows), -1), positions], 1)
        inputs["attention_mask"] = block_mask(torch.cat([image_block, block], 1))
        return inputs

    def _blocks(self, row) -> list[tuple[list[int], list[int]]]:
        end = self.processor.tokenizer.eos_token_id
        blocks = []
        for question, answers in zip(row["questions"], row["answers"]):
            question_ids = self._ids(self.prompt.removeprefix("<image>").replace("{question}", question))
            blocks.append((question_ids, self._ids(f" {answers[0]}") + ([] if end is None else [end])))
        return blocks

    def _ids(self, text: str) -> list[int]:
        # A scene data set repeats a few hundred texts millions of times.
        if text not in self._cache:
            self._cache[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]


def block_mask(block: torch.Tensor) -> torch.Tensor:
    """Builds the mask of causal attention to the image and within each block.

    Args:
        block: block of each position, `(batch, length)`; -2 marks the image, -1 padding.

    Returns:
        `(batch, 1, length, length)`, True where the query (row) may attend to the key (column).
    """
    length = block.shape[1]
    see = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2)
    return (see & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
