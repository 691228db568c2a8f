"""Accuracy, tokens and cost of a `PrunedVLM` in one mode, over a set of VQA rows."""

from typing import Any

from ..metrics.vqa import accuracy_by_type, bleu, vqa_accuracy
from .vqa_generation import generate_answers

AVERAGED = ("flops", "flops_origin", "flops_ratio", "sequence_kept", "average_kept", "vision_tokens", "text_tokens")


def evaluate_mode(
    model, collator, rows, mode: str = "hard", max_new_tokens: int = 4, batch_size: int = 50
) -> dict[str, Any]:
    """Generated answers and what they cost.

    Returns:
        accuracy: by question type and over all; `scores`: per row; `answers`: the texts; `bleu`: corpus BLEU;
        flops, flops_origin, flops_ratio, sequence_kept, average_kept, vision_tokens, text_tokens: means over batches;
        vision_tokens_per_layer, kv_bytes, kv_bytes_origin: likewise.
    """
    reports: list[tuple[int, dict]] = []
    answers = generate_answers(
        model,
        collator,
        rows,
        batch_size,
        max_new_tokens,
        lambda batch: reports.append((len(batch["input_ids"]), model.token_report())),
        pruning_mode=mode,
    )
    references = [row["answers"][0] for row in (rows[i] for i in range(len(rows)))]
    types = [row["types"][0] for row in (rows[i] for i in range(len(rows)))]
    scores = vqa_accuracy(answers, references)
    total = sum(count for count, _ in reports)
    mean = lambda values: sum(c * v for (c, _), v in zip(reports, values)) / total  # noqa: E731
    result: dict[str, Any] = {
        "accuracy": accuracy_by_type(scores, types),
        "scores": scores,
        "answers": answers,
        "bleu": bleu(answers, references),
    }
    for name in (*AVERAGED, "kv_bytes", "kv_bytes_origin"):
        result[name] = mean([report[name] for _, report in reports])
    layers = len(reports[0][1]["vision_tokens_per_layer"])
    result["vision_tokens_per_layer"] = [
        mean([report["vision_tokens_per_layer"][i] for _, report in reports]) for i in range(layers)
    ]
    return result
