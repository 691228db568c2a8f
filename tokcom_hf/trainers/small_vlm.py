"""Trains a small VLM from scratch on packed questions, with a tower that can already see."""

from dataclasses import dataclass, field

from .base import CompressionTrainer, CompressionTrainingArguments
from .muon import MuonWithAdamW, split_for_muon


@dataclass
class SmallVLMTrainingArguments(CompressionTrainingArguments):
    """Arguments of `SmallVLMTrainer`."""

    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "Learning rate of Muon for the matrices; 0 trains all with AdamW."}
    )


class SmallVLMTrainer(CompressionTrainer):
    """`Trainer` with Muon for the matrices, which learns to look things up in far fewer steps than AdamW."""

    args: SmallVLMTrainingArguments

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon_learning_rate == 0:
            return super().create_optimizer(*args, **kwargs)
        if self.optimizer is None:
            matrices, others = split_for_muon(self.unwrapped_model)
            self.optimizer = MuonWithAdamW(
                matrices,
                others,
                muon_learning_rate=self.args.muon_learning_rate,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        return self.optimizer
