"""Prints the held-out results of recipes/train_joint_lfq.py."""

from collections.abc import Mapping
from typing import Any


def print_report(results: Mapping[str, Any], codebook_size: int, draws: bool) -> None:
    """Prints the results of `evaluate_joint` before and after training.

    Args:
        results: dictionary with the results "before" and "after" training, and "held_out_images".
        codebook_size: number of codes of the quantizer.
        draws: whether the model has LFQ ids, and therefore a generation loss.
    """
    before, after = results["before"], results["after"]
    row = lambda name: f"{before[name]:.4f} before, {after[name]:.4f} after training"  # noqa: E731
    print(f"\nheld-out, {results['held_out_images']} images, {after['tokens']:,} tokens")
    if draws:
        print(f"  generation loss {after['generation_loss']:.3f} nats per token; a uniform guess has ln "
              f"{codebook_size:,} = {after['generation_chance']:.3f}, before training "
              f"{before['generation_loss']:.3f}")  # fmt: skip
        print(f"    without captions {after['generation_loss_no_caption']:.3f}; entropy of the code frequencies "
              f"{after['entropy']:.3f}")  # fmt: skip
    print(f"  understanding KL, quantized features: {row('quantized_kl')}")
    print(f"  understanding KL, continuous features: {row('continuous_kl')}")
    if draws:
        print(f"  probability of an image token where an answer's first token follows: {row('lfq_mass_first')}")
    if "agreement" in after:
        print(f"  answers from quantized features equal the teacher's: {after['agreement']:.1%} of {after['questions']} "
              f"({before['agreement']:.1%} before); from continuous {after['continuous_agreement']:.1%}")  # fmt: skip
        print(f"  correct answers: teacher {after['teacher_accuracy']:.1%}, "
              f"quantized {after['accuracy']:.1%}")  # fmt: skip
    print(f"  bits: means {after['bit_mean_min']:.3f} to {after['bit_mean_max']:.3f}, {after['dead_bits']} dead; flip "
          f"rates {min(after['flip_rate']):.3f} to {max(after['flip_rate']):.3f}; correlation mean "
          f"{after['mean_correlation']:.3f}, largest {after['max_correlation']:.3f}")  # fmt: skip
    print(f"  codes in use: {after['active']:,}, {after['utilization']:.2%} where {after['utilization_ceiling']:.2%} is "
          f"the ceiling for this number of tokens; perplexity {after['perplexity']:.0f}")  # fmt: skip
