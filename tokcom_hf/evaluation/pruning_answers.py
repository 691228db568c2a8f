"""Accuracy, token counts and cost of a `PrunedVLM` on VQA rows."""

from typing import Any

from ..metrics.vqa import accuracy_by_type, bleu, vqa_accuracy
from .vqa_generation import generate_answers

AVERAGED = ("flops", "flops_origin", "flops_ratio", "sequence_kept", "average_kept", "vision_tokens", "text_tokens")


def evaluate_mode(
    model,
    collator,
    rows,
    mode: str = "hard",
    max_new_tokens: int = 4,
    batch_size: int = 50,
    caption_max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Generates answers in one pruning mode and measures their accuracy and cost.

    Args:
        model: a `PrunedVLM`.
        collator: a `VQACollator` with `answers=False`.
        rows: questions and requests for captions, from `vqa_tasks.evaluation_rows`.
        mode: pruning mode.
        max_new_tokens, caption_max_new_tokens: maximum tokens of an answer and of a caption.
        batch_size: rows per batch.

    Returns:
        accuracy: by question type and over all questions; exact match of captions if there are only captions.
        scores, answers: accuracy and text of each row.
        bleu: smoothed corpus BLEU of the captions, or of the answers if there are no captions.
        flops, flops_origin, flops_ratio, sequence_kept, average_kept, vision_tokens, text_tokens,
        vision_tokens_per_layer, kv_bytes, kv_bytes_origin: entries of `PrunedVLM.token_report`, means over rows.
        merged_tokens: number of vision tokens of each row after stage 1; merged_tokens_by_type: means per type.
    """
    reports: list[tuple[int, dict]] = []
    every = [rows[i] for i in range(len(rows))]
    captions = [place for place, row in enumerate(every) if row.get("task") == "caption"]
    questions = [place for place, row in enumerate(every) if row.get("task") != "caption"]
    answers, merged = [""] * len(every), [0] * len(every)
    for places, length in ((questions, max_new_tokens), (captions, caption_max_new_tokens)):
        before = len(reports)
        texts = generate_answers(
            model,
            collator,
            [every[place] for place in places],
            batch_size,
            length,
            lambda batch: reports.append((len(batch["input_ids"]), model.token_report())),
            pruning_mode=mode,
        )
        counts = [row[0] for _, report in reports[before:] for row in report["vision_tokens_by_row"]]
        for place, text, count in zip(places, texts, counts, strict=True):
            answers[place], merged[place] = text, count
    references = [row["answers"][0] for row in every]
    scores = vqa_accuracy(answers, references)
    scored, compared = questions or captions, captions or questions
    accuracy = accuracy_by_type([scores[i] for i in scored], [every[i]["types"][0] for i in scored])
    total = sum(count for count, _ in reports)
    mean = lambda values: sum(c * v for (c, _), v in zip(reports, values)) / total  # noqa: E731
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "scores": scores,
        "answers": answers,
        "merged_tokens": merged,
        "merged_tokens_by_type": accuracy_by_type(merged, [row["types"][0] for row in every]),
        "bleu": bleu([answers[i] for i in compared], [references[i] for i in compared], smooth=True),
    }
    for name in (*AVERAGED, "kv_bytes", "kv_bytes_origin"):
        result[name] = mean([report[name] for _, report in reports])
    layers = len(reports[0][1]["vision_tokens_per_layer"])
    result["vision_tokens_per_layer"] = [
        mean([report["vision_tokens_per_layer"][i] for _, report in reports]) for i in range(layers)
    ]
    return result


def named_metrics(table: dict[str, dict]) -> dict[str, float]:
    """Computes the documented metrics from a table of modes, one number each.

    Args:
        table: mode -> result of `evaluate_mode`; needs `origin`, and `merge_only` or `hard`.

    Returns:
        accuracy_baseline, accuracy_<mode>: accuracy over all questions of `origin` and of each other mode.
        bleu_baseline, bleu_<mode>: smoothed BLEU, in [0, 100]; bleu_drop_<mode>: points below bleu_baseline.
        avg_original_tokens, avg_merged_tokens: vision tokens before and after stage 1; keep_ratio_merge: their quotient.
    """
    origin = table["origin"]
    merged = table["merge_only" if "merge_only" in table else "hard"]["vision_tokens_per_layer"][0]
    others = [mode for mode in table if mode != "origin"]
    return {
        "accuracy_baseline": origin["accuracy"]["all"],
        **{f"accuracy_{mode}": table[mode]["accuracy"]["all"] for mode in others},
        "bleu_baseline": origin["bleu"],
        **{f"bleu_{mode}": table[mode]["bleu"] for mode in others},
        **{f"bleu_drop_{mode}": origin["bleu"] - table[mode]["bleu"] for mode in others},
        "avg_original_tokens": origin["vision_tokens"],
        "avg_merged_tokens": merged,
        "keep_ratio_merge": merged / origin["vision_tokens"],
    }
