"""Held-out evaluation of joint LFQ training: losses, agreement with the teacher's answers, and bit statistics."""

import math
from collections import defaultdict
from typing import Any

import torch

from ..metrics.lfq import bit_report
from ..metrics.vqa import vqa_accuracy
from .lfq_bases import generate_text


class _Means:
    """Weighted means by name; each added mean is weighted by the number of items that it averages."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: torch.Tensor | float, count: int) -> None:
        self.sums[name] += float(value) * count
        self.counts[name] += count

    def result(self) -> dict[str, float]:
        return {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}


@torch.no_grad()
def evaluate_joint(trainer: Any, rows) -> dict[str, Any]:
    """Measures a `JointLFQTrainer`'s model on held-out rows.

    Returns:
        generation_loss, generation_loss_no_caption: nats per image token, with captions and with captions masked; the
            difference is the information that captions give.
        generation_chance: ln of the number of codes, the loss of a uniform guess.
        quantized_kl, continuous_kl: KL divergence from the teacher, nats per answer token, over all ids.
        lfq_mass, continuous_lfq_mass: probability of LFQ ids where an answer token follows; lfq_mass_first: the same before
            an answer's first token only.
        reconstruction_loss, entropy_loss, sample_entropy, batch_entropy: of the quantizer.
        agreement, continuous_agreement: share of rows whose greedy answer to the first question equals the teacher's, from
            quantized and from continuous features.
        questions, accuracy, teacher_accuracy: number of those questions, and the accuracies from quantized features and of
            the teacher.
        and all of `metrics.lfq.bit_report`. A model without LFQ ids has no generation and no lfq_mass entries.
    """
    model = trainer.unwrapped_model
    was_training = model.training
    model.eval()
    means, codes = _Means(), []
    answers: dict[str, list[str]] = {"teacher": [], "quantized": [], "continuous": []}
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch_rows = [rows[i] for i in range(start, min(start + size, len(rows)))]
        inputs = trainer._prepare_inputs(trainer.data_collator(batch_rows))
        with trainer.compute_loss_context_manager():
            features, read = model.see(inputs.pop("pixel_values"))
            teacher = trainer.teacher_logits(features, inputs)
            output = model(image_features=features, teacher_logits=teacher, quantizer_features=read, **inputs)
        _add_understanding(means, output, inputs["labels"], len(teacher), model.draws)
        if model.draws:
            _add_generation(means, trainer, model, output, inputs)
        codes.append(output.quantizer.codes.cpu())
        if trainer.generation_collator is not None:
            prompts = trainer._prepare_inputs(trainer.generation_collator(batch_rows))
            _answer(trainer, model, features, output.quantizer.embeddings, prompts, answers)
    report: dict[str, Any] = means.result()
    if model.draws:
        report["generation_chance"] = math.log(model.quantizer.config.codebook_size)
    if answers["teacher"]:
        report |= _compare(answers, [rows[i]["answers"][0] for i in range(len(rows))])
    model.train(was_training)
    return report | bit_report(torch.cat(codes))


def _add_generation(means: _Means, trainer, model, output, inputs) -> None:
    """Adds the loss of the image tokens after the caption, and after a masked caption."""
    codes = output.quantizer.codes
    tokens = codes.shape[0] * codes.shape[1]
    means.add("generation_loss", output.generation_loss, tokens)
    start_only = inputs["caption_mask"].clone()
    start_only[:, :-1] = 0
    with trainer.compute_loss_context_manager():
        no_caption = model.generation_loss(codes, inputs["caption_ids"], start_only)
    means.add("generation_loss_no_caption", no_caption, tokens)


def _add_understanding(means: _Means, output, labels: torch.LongTensor, answer_tokens: int, draws: bool) -> None:
    """Adds KL divergences from the teacher, the quantizer's losses and, for a model with LFQ ids, their probability mass."""
    means.add("quantized_kl", output.quantized_kl, answer_tokens)
    means.add("continuous_kl", output.continuous_kl, answer_tokens)
    follows = labels[:, 1:] != -100
    first = (follows & (labels[:, :-1] == -100))[follows]
    if draws:
        masses = {
            "lfq_mass": output.lfq_mass,
            "continuous_lfq_mass": output.continuous_lfq_mass,
            "lfq_mass_first": output.lfq_mass[first],
        }
        for name, mass in masses.items():
            means.add(name, mass.mean() if len(mass) else 0.0, len(mass))
    tokens = output.quantizer.codes.shape[0] * output.quantizer.codes.shape[1]
    for name in ("reconstruction_loss", "entropy_loss", "sample_entropy", "batch_entropy"):
        means.add(name, output.quantizer[name], tokens)


def _compare(answers: dict[str, list[str]], truth: list[list[str]]) -> dict[str, float | int]:
    """Returns agreement with the teacher and accuracies."""
    teacher = answers["teacher"]
    report: dict[str, float | int] = {"questions": len(teacher)}
    for who, name in (("quantized", "agreement"), ("continuous", "continuous_agreement")):
        report[name] = sum(a == b for a, b in zip(teacher, answers[who])) / len(teacher)
    for who, name in (("quantized", "accuracy"), ("teacher", "teacher_accuracy")):
        scores = vqa_accuracy(answers[who], truth)
        report[name] = sum(scores) / len(scores)
    return report


def _answer(trainer, model, features, quantized, prompts, answers) -> None:
    """Appends the greedy answers of teacher and student to `answers`."""
    tokenizer = trainer.generation_collator.processor.tokenizer
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    options = {"attention_mask": mask, "max_new_tokens": trainer.args.eval_max_new_tokens, "do_sample": False}

    def answer(language_model, image_features) -> list[str]:
        generated = generate_text(language_model, model.embed(ids, image_features), **options)
        return [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]

    student = model.language_model
    with trainer.compute_loss_context_manager():
        continuous = answer(student, features)
        answers["continuous"] += continuous
        answers["quantized"] += answer(student, quantized)
        # If the base model is frozen there is no separate teacher: the student with continuous features is the teacher.
        answers["teacher"] += continuous if trainer.teacher is None else answer(trainer.teacher, features)
