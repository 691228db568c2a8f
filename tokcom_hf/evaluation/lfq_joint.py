"""Held-out evaluation of joint LFQ training: losses, answers beside the teacher's, and the state of the bits."""

import math
from collections import defaultdict
from typing import Any

import torch

from ..metrics.lfq import bit_report
from ..metrics.vqa import vqa_accuracy
from .lfq_bases import generate_text


class _Means:
    """Means by name over everything added, each value weighted by what it is the mean of."""

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
        generation_loss (nats per image token, captions given), generation_loss_no_caption (captions hidden; the
        difference is what captions tell), generation_chance (ln of the number of codes); quantized_kl and
        continuous_kl (nats per answer token, over all ids), lfq_mass and continuous_lfq_mass (probability of an LFQ id
        where an answer token follows), lfq_mass_first (the same before an answer's first token), reconstruction_loss,
        entropies; agreement (share of rows whose greedy answer to the first question, from quantized features, is word
        for word the teacher's) and continuous_agreement; accuracy, teacher_accuracy; and `metrics.lfq.bit_report` of all
        codes. A model without LFQ ids has no generation loss and no probability mass on them.
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
    """The loss of the image's tokens behind its caption, and behind a hidden one."""
    codes = output.quantizer.codes
    tokens = codes.shape[0] * codes.shape[1]
    means.add("generation_loss", output.generation_loss, tokens)
    hidden = inputs["caption_mask"].clone()
    hidden[:, :-1] = 0
    with trainer.compute_loss_context_manager():
        blind = model.generation_loss(codes, inputs["caption_ids"], hidden)
    means.add("generation_loss_no_caption", blind, tokens)


def _add_understanding(means: _Means, output, labels: torch.LongTensor, answer_tokens: int, draws: bool) -> None:
    """Distances to the teacher, the quantizer's losses and, in a model that draws, the mass on LFQ ids."""
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
    """Agreement with the teacher and accuracy."""
    teacher = answers["teacher"]
    report: dict[str, float | int] = {"questions": len(teacher)}
    for who, name in (("quantized", "agreement"), ("continuous", "continuous_agreement")):
        report[name] = sum(a == b for a, b in zip(teacher, answers[who])) / len(teacher)
    for who, name in (("quantized", "accuracy"), ("teacher", "teacher_accuracy")):
        scores = vqa_accuracy(answers[who], truth)
        report[name] = sum(scores) / len(scores)
    return report


def _answer(trainer, model, features, quantized, prompts, answers) -> None:
    """Adds each side's greedy answers to the prompts."""
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
        # Where nothing of the base trains, the student that sees continuous features is the teacher.
        answers["teacher"] += continuous if trainer.teacher is None else answer(trainer.teacher, features)
