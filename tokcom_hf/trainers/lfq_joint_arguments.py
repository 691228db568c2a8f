"""Arguments of joint LFQ training."""

from dataclasses import dataclass, field

from .base import CompressionTrainingArguments


@dataclass
class JointLFQTrainingArguments(CompressionTrainingArguments):
    """Arguments of `JointLFQTrainer`; the documented numbers are the defaults."""

    builds_own_optimizer = True

    learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of every part that has no rate of its own."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "First beta of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices; vectors have none."})
    quantizer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the quantizer; by default learning_rate."}
    )
    new_rows_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the LFQ token rows; by default learning_rate."}
    )
    llm_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the language model's layers and old rows; by default learning_rate."},
    )
    tune_llm: bool = field(default=True, metadata={"help": "Also train the language model's layers."})
    generation_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy of image tokens."})
    understanding_weight: float = field(default=25.0, metadata={"help": "Weight of the two KL losses to the teacher."})
    reconstruction_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reconstruction loss of features."}
    )
    entropy_weight: float = field(default=1.0, metadata={"help": "Weight of the entropy loss at the start."})
    entropy_weight_end: float = field(default=0.1, metadata={"help": "Weight of the entropy loss once annealed."})
    entropy_anneal: float = field(
        default=0.5, metadata={"help": "Share of training over which the entropy weight falls, linearly."}
    )
    quantizer_start_steps: int = field(
        default=400,
        metadata={"help": "Steps before training in which the quantizer alone learns to reconstruct features."},
    )
    quantizer_start_images: int = field(
        default=1024,
        metadata={"help": "Training images for quantizer_start_steps; 0 leaves the quantizer as it was initialised."},
    )
    quantizer_start_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate during quantizer_start_steps."}
    )
    caption_drop: float = field(
        default=0.1, metadata={"help": "Share of captions left out, for classifier-free guidance in generation."}
    )
    eval_max_new_tokens: int = field(
        default=4, metadata={"help": "Longest generated answer in evaluations, in tokens."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError("Joint LFQ training runs in bf16 or fp32; fp16 overflows in the KL. Set bf16 instead.")
        for name in ("caption_drop", "entropy_anneal"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        weights = ["generation_weight", "understanding_weight", "reconstruction_weight", "entropy_weight"]
        for name in [*weights, "entropy_weight_end", "quantizer_start_steps", "quantizer_start_images"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
