"""Trains the image tokenizer of recipes/image_tokens.py: a VQGAN on the images of caption rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.caption_images import PixelRows
from ..trainers.vqgan import VQGANTrainer, VQGANTrainingArguments


def train_image_tokenizer(
    model,
    image_processor,
    train,
    held_out,
    values: dict[str, Any],
    folder: Path,
    seed: int,
    train_with: Callable[[VQGANTrainer], None] = VQGANTrainer.train,
):
    """Trains a VQGAN on the images of caption rows and returns it, on the CPU, with its averaged weights.

    Args:
        model: `VQGAN` to train.
        image_processor: the model's `VQGANImageProcessor`.
        train, held_out: caption rows.
        values: fields of `VQGANTrainingArguments`.
        folder: output folder of the trainer.
        seed: seed of the training.
        train_with: calls the trainer's `train`, with the checkpoint to resume from, if there is one.
    """
    args = VQGANTrainingArguments(**values | {"output_dir": str(folder), "seed": seed, "report_to": "none"})
    trainer = VQGANTrainer(
        model,
        args,
        None,
        train_dataset=PixelRows(train, image_processor),
        eval_dataset=PixelRows(held_out, image_processor),
        processing_class=image_processor,
    )
    train_with(trainer)
    trainer.use_averaged_weights()
    trainer.average = None
    trainer.evaluate()
    return trainer.unwrapped_model.to("cpu")
