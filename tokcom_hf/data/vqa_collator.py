"""Turns visual question answering rows into model inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass
class VQACollator:
    """Turns rows into model inputs with labels only on the answers and their EOS tokens.

    Args:
        processor: the VLM's processor.
        prompt: text before the answer; `{question}` is replaced, `<image>` stands for the processor's image token. Other
            braces stay as they are.
        follow_up: prompt of the second and later questions about the same image.
        answers: append the answers and return `labels`; off for generation, where rows are padded on the left.
        max_questions: maximum number of questions used per row; None uses all.
        image_limit: shrinks an image before the processor receives it (`image_limit.ImageLimit`).

    Raises:
        ValueError: `prompt` or `follow_up` lacks `{question}`.
    """

    processor: Any
    prompt: str = "<image> {question}"
    follow_up: str = " {question}"
    answers: bool = True
    max_questions: int | None = None
    image_limit: Callable[[Any], Any] | None = None

    def __post_init__(self):
        require_placeholder("prompt", self.prompt, "{question}")
        require_placeholder("follow_up", self.follow_up, "{question}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        image_token = getattr(self.processor, "image_token", "<image>")
        texts, images = [], []
        for row in rows:
            prompt = self.prompt if row["image"] is not None else self.prompt.replace("<image>", "").lstrip()
            texts.append(prompt.replace("<image>", image_token).replace("{question}", row["questions"][0]))
            if row["image"] is not None:
                images.append(row["image"] if self.image_limit is None else self.image_limit(row["image"]))
        inputs = dict(self.processor(text=texts, images=images or None, return_tensors="pt", padding=True))
        mask = inputs.pop("attention_mask").bool()
        width = mask.shape
        sequences = {k: inputs.pop(k) for k in list(inputs) if inputs[k].shape == width}
        rows_of = {key: [value[m] for value, m in zip(values, mask)] for key, values in sequences.items()}
        labels = [torch.full_like(ids, IGNORED) for ids in rows_of["input_ids"]]
        if self.answers:
            for i, row in enumerate(rows):
                answer_ids, answer_labels = self._answer_ids(tokenizer, row)
                for key, values in rows_of.items():
                    extra = answer_ids if key == "input_ids" else torch.zeros_like(answer_ids)
                    values[i] = torch.cat([values[i], extra.to(values[i].dtype)])
                labels[i] = torch.cat([labels[i], answer_labels])
        length = max(len(ids) for ids in rows_of["input_ids"])
        pad = tokenizer.pad_token_id or 0
        left = not self.answers
        for key, values in rows_of.items():
            inputs[key] = pad_rows(values, length, pad if key == "input_ids" else 0, left)
        inputs["attention_mask"] = pad_rows([torch.ones_like(ids) for ids in rows_of["input_ids"]], length, 0, left)
        if self.answers:
            inputs["labels"] = pad_rows(labels, length, IGNORED, left)
        return inputs

    def _answer_ids(self, tokenizer, row) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = [], []
        pairs = list(zip(row["questions"], row["answers"]))[: self.max_questions]
        for turn, (question, answers) in enumerate(pairs):
            if turn:
                question_ids = tokenizer(
                    self.follow_up.replace("{question}", question), add_special_tokens=False
                ).input_ids
                ids += question_ids
                labels += [IGNORED] * len(question_ids)
            answer_ids = tokenizer(f" {answers[0]}", add_special_tokens=False).input_ids
            if tokenizer.eos_token_id is not None:
                answer_ids = [*answer_ids, tokenizer.eos_token_id]
            ids += answer_ids
            labels += answer_ids
        return torch.tensor(ids), torch.tensor(labels)


def require_placeholder(name: str, prompt: str, placeholder: str) -> None:
    """Raises ValueError if `prompt` lacks the `placeholder`, because the prompt would then be the same for all rows."""
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a text that contains {placeholder}, got {prompt!r}.")
    if placeholder not in prompt:
        raise ValueError(f"{name} must contain {placeholder}, got {prompt!r}.")


def pad_rows(rows: list[torch.Tensor], length: int, value: int, left: bool) -> torch.Tensor:
    """Stacks tensors `(n,)` of different n into `(rows, length)`, padded with `value` on the left or on the right."""
    missing = [length - len(row) for row in rows]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return torch.stack([torch.nn.functional.pad(row, side, value=value) for row, side in zip(rows, sides)])
