"""Trains a small VLM from scratch on packed questions, with a tower that can already see."""

from dataclasses import dataclass, field

from ..trainers.base import CompressionTrainer, CompressionTrainingArguments


@dataclass
class SmallVLMTrainingArguments(CompressionTrainingArguments):
    """Arguments of `SmallVLMTrainer`."""

    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "Learning rate of Muon for the matrices; 0 trains all with AdamW."}
    )


class SmallVLMTrainer(CompressionTrainer):
    """`Trainer` with Muon for the matrices: it learns to read answers off the image in far fewer steps than AdamW."""

    args: SmallVLMTrainingArguments
    arguments_class = SmallVLMTrainingArguments
    data_columns = None
