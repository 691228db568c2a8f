"""Arguments of the trainers of TokCom's two stages."""

from dataclasses import dataclass, field

from .base import CompressionTrainingArguments


@dataclass
class TokComTrainingArguments(CompressionTrainingArguments):
    """Arguments of every TokCom stage."""

    sample_every: float = field(
        default=1.0,
        metadata={"help": "Epochs between tables of samples, which are printed and logged; 0 shows none."},
    )
    num_samples: int = field(default=2, metadata={"help": "Rows of the sample tables."})
    metric_rows: int = field(
        default=64, metadata={"help": "Held-out rows on which each evaluation measures accuracies."}
    )


@dataclass
class TokComVAETrainingArguments(TokComTrainingArguments):
    """Arguments of the VAE stage. Documented: 5 epochs, learning rate 1e-4."""

    eval_noise_levels: list[float] = field(
        default_factory=lambda: [0.0, 0.5],
        metadata={"help": "Latent noise (in standard deviations) at which held-out accuracy is measured."},
    )
    random_chunks: float = field(
        default=0.0,
        metadata={
            "help": "Share of training chunks replaced by uniformly random tokens, drawn anew in each step, so that rare "
            "tokens are learned, too."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.random_chunks <= 1.0:
            raise ValueError(f"random_chunks is a share in [0, 1], got {self.random_chunks}.")


@dataclass
class DenoiserTrainingArguments(TokComTrainingArguments):
    """Arguments of the denoiser stage. Documented: 10 epochs, learning rate 3e-5, batch 8."""

    eval_times: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        metadata={"help": "Times t (0 noise, 1 clean) at which held-out denoising accuracy is measured."},
    )
    sample_steps: int = field(default=8, metadata={"help": "Flow steps of the samples shown during training."})
