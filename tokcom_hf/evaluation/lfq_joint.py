"""Held-out evaluation of joint LFQ training: losses, answers beside the teacher's, and the state of the bits."""

import math
from typing import Any

import torch

from ..metrics.lfq import bit_report
from ..metrics.vqa import vqa_accuracy
from .lfq_bases import generate_text


@torch.no_grad()
def evaluate_joint(trainer: Any, rows) -> dict[str, Any]:
    """Measures a `JointLFQTrainer`'s model on held-out rows.

    Returns:
        generation_loss (nats per image token, captions given), generation_loss_no_caption (captions hidden; the
        difference is what captions tell), generation_chance (ln of the number of codes); quantized_kl and
        continuous_kl (nats per answer token, over all ids), lfq_mass and continuous_lfq_mass (probability of an LFQ id
        where an answer token follows), lfq_mass_first (where the first one does), reconstruction_loss, entropies;
        agreement (share of rows whose greedy answer to the first question, from quantized features, is word for word
        the teacher's) and continuous_agreement; accuracy, teacher_accuracy; and `metrics.lfq.bit_report` of all codes.
        A model without LFQ ids has no generation loss and no mass of theirs.
    """
    model, args = trainer.unwrapped_model, trainer.args
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    codes = []
    answers: dict[str, list[str]] = {"teacher": [], "quantized": [], "continuous": []}

    def add(name: str, value, count: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * count
        counts[name] = counts.get(name, 0.0) + count

    size = args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch_rows = [rows[i] for i in range(start, min(start + size, len(rows)))]
        inputs = trainer._prepare_inputs(trainer.data_collator(batch_rows))
        with trainer.compute_loss_context_manager():
            features, read = model.see(inputs.pop("pixel_values"))
            teacher = trainer.teacher_logits(features, inputs)
            output = model(image_features=features, teacher_logits=teacher, quantizer_features=read, **inputs)
        tokens = output.quantizer.codes.shape[0] * output.quantizer.codes.shape[1]
        if model.draws:
            add("generation_loss", output.generation_loss, tokens)
            hidden = inputs["caption_mask"].clone()
            hidden[:, :-1] = 0
            with trainer.compute_loss_context_manager():
                blind = model.generation_loss(output.quantizer.codes, inputs["caption_ids"], hidden)
            add("generation_loss_no_caption", blind, tokens)
        add("quantized_kl", output.quantized_kl, len(teacher))
        add("continuous_kl", output.continuous_kl, len(teacher))
        labels = inputs["labels"]
        follows = labels[:, 1:] != -100
        first = (follows & (labels[:, :-1] == -100))[follows]
        for name, mass in (
            ("lfq_mass", output.lfq_mass),
            ("continuous_lfq_mass", output.continuous_lfq_mass),
            ("lfq_mass_first", output.lfq_mass[first]),
        ):
            if model.draws:
                add(name, mass.mean() if len(mass) else 0.0, len(mass))
        for name in ("reconstruction_loss", "entropy_loss", "sample_entropy", "batch_entropy"):
            add(name, output.quantizer[name], tokens)
        codes.append(output.quantizer.codes.cpu())
        if trainer.generation_collator is not None:
            prompts = trainer._prepare_inputs(trainer.generation_collator(batch_rows))
            _answer(trainer, model, features, output.quantizer.embeddings, prompts, answers)
    report: dict[str, Any] = {name: sums[name] / max(counts[name], 1) for name in sums}
    if model.draws:
        report["generation_chance"] = math.log(model.quantizer.config.codebook_size)
    if answers["teacher"]:
        truth = [rows[i]["answers"][0] for i in range(len(rows))]
        told = answers["teacher"]
        same = lambda other: sum(a == b for a, b in zip(told, other)) / len(told)  # noqa: E731
        report["agreement"], report["questions"] = same(answers["quantized"]), len(told)
        report["continuous_agreement"] = same(answers["continuous"])
        for name, key in (("quantized", "accuracy"), ("teacher", "teacher_accuracy")):
            scores = vqa_accuracy(answers[name], truth)
            report[key] = sum(scores) / len(scores)
    model.train(was_training)
    return report | bit_report(torch.cat(codes))


def _answer(trainer, model, features, quantized, prompts, answers) -> None:
    tokenizer = trainer.generation_collator.processor.tokenizer
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    options = {"attention_mask": mask, "max_new_tokens": trainer.args.eval_max_new_tokens, "do_sample": False}

    def answer(who, seen) -> list[str]:
        told = generate_text(who, model.embed(ids, seen), **options)
        return [text.strip() for text in tokenizer.batch_decode(told, skip_special_tokens=True)]

    student = model.language_model
    with trainer.compute_loss_context_manager():
        continuous = answer(student, features)
        answers["continuous"] += continuous
        answers["quantized"] += answer(student, quantized)
        # Where nothing of the base trains, the student that sees continuous features is the teacher.
        answers["teacher"] += continuous if trainer.teacher is None else answer(trainer.teacher, features)
