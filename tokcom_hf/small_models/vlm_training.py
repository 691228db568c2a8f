"""Trainer of a small VLM from scratch on packed questions, with a pretrained vision tower."""

from dataclasses import dataclass, field

from ..trainers.base import CompressionTrainer, CompressionTrainingArguments


@dataclass
class SmallVLMTrainingArguments(CompressionTrainingArguments):
    """Arguments of `SmallVLMTrainer`."""

    muon_learning_rate: float = field(
        default=0.02,
        metadata={"help": "Learning rate of Muon for weight matrices; 0 trains all parameters with AdamW."},
    )


class SmallVLMTrainer(CompressionTrainer):
    """`Trainer` with Muon for weight matrices, which needs far fewer steps than AdamW until answers depend on the image."""

    args: SmallVLMTrainingArguments
    arguments_class = SmallVLMTrainingArguments
    data_columns = None
