"""Arguments of `VQGANTrainer`."""

import math
from dataclasses import dataclass, field

from .base import CompressionTrainingArguments


@dataclass
class VQGANTrainingArguments(CompressionTrainingArguments):
    """Arguments of `VQGANTrainer`; settings of the codebook are in `VQGANConfig`.

    A share of training is a fraction of all optimizer steps, so that a schedule keeps its shape in a short run.
    """

    perceptual: str = field(
        default="pyramid",
        metadata={"help": "none, pyramid (MS-SSIM and gradients), random, lpips, or backbone:<name or folder>."},
    )
    perceptual_weight: float = field(default=0.005, metadata={"help": "Weight of the perceptual loss."})
    adversarial_weight: float = field(default=0.4, metadata={"help": "Weight of the adversarial loss; 0 = none."})
    adversarial_start: float = field(default=0.3, metadata={"help": "Share of training without a discriminator."})
    adversarial_warmup: float = field(
        default=0.1,
        metadata={"help": "Share of training over which the adversarial weight then grows to its full value."},
    )
    adaptive_weight: bool = field(
        default=True, metadata={"help": "Scale the adversarial loss by the gradient ratio at the last decoder layer."}
    )
    adaptive_weight_limit: float = field(default=1.0, metadata={"help": "Largest adaptive weight."})
    gan_loss: str = field(default="hinge", metadata={"help": "hinge or non_saturating."})
    gan_regularizer: str = field(default="lecam", metadata={"help": "none, lecam or r1."})
    gan_regularizer_weight: float = field(default=0.001, metadata={"help": "Weight of the regularizer (R1: about 1)."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the discriminator; by default learning_rate."}
    )
    commitment_warmup_epochs: float = field(
        default=5.0, metadata={"help": "Epochs over which the commitment weight grows from 0."}
    )
    autoencoder_steps: int | float = field(
        default=0,
        metadata={
            "help": "Number of first steps without quantization (below 1: share of training); then the codes are placed on "
            "features of training images."
        },
    )
    temperature_schedule: str = field(
        default="linear",
        metadata={"help": "linear: the sampling temperature falls to 0 over temperature_anneal; constant: it stays."},
    )
    temperature_anneal: float = field(
        default=0.5, metadata={"help": "Share of training over which a linear temperature falls to 0."}
    )
    reset_epochs: float = field(
        default=1.0, metadata={"help": "Epochs between resets of dead codes, where reset_interval is 0."}
    )
    reset_stop: float = field(default=0.85, metadata={"help": "Share of training after which no code is reset."})
    codebook_expansion: bool = field(
        default=False,
        metadata={
            "help": "Double the codebook of an `ema` quantizer during training when most of its codes are in use."
        },
    )
    codebook_expansion_epochs: float = field(
        default=1.0, metadata={"help": "Epochs between two checks of codebook usage."}
    )
    codebook_expansion_utilization: float = field(
        default=0.9,
        metadata={"help": "Share of codes used in the last monitor_window steps at which the codebook doubles."},
    )
    codebook_expansion_limit: int = field(default=512, metadata={"help": "Largest size that a codebook expands to."})
    init_images: int = field(
        default=1024,
        metadata={"help": "Training images on whose features `data` and `kmeans` initialization place the codes."},
    )
    monitor_window: int = field(
        default=100, metadata={"help": "Optimizer steps over which windowed codebook usage is counted."}
    )
    num_pictures: int = field(default=16, metadata={"help": "Held-out images in the saved reconstruction grids."})
    sample_dir: str | None = field(
        default=None, metadata={"help": "Folder for one more reconstruction grid after every epoch."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError("One fp16 gradient scaler cannot serve two optimizers; use bf16 or fp32 instead of fp16.")
        if self.gan_loss not in ("hinge", "non_saturating"):
            raise ValueError(f"gan_loss must be hinge or non_saturating, got {self.gan_loss!r}.")
        if self.gan_regularizer not in ("none", "lecam", "r1"):
            raise ValueError(f"gan_regularizer must be none, lecam or r1, got {self.gan_regularizer!r}.")
        if self.temperature_schedule not in ("linear", "constant"):
            raise ValueError(f"temperature_schedule must be linear or constant, got {self.temperature_schedule!r}.")
        for name in ("adversarial_start", "adversarial_warmup", "temperature_anneal", "reset_stop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share of training and must be in [0, 1], got {getattr(self, name)}.")
        for name in ("perceptual_weight", "adversarial_weight", "commitment_warmup_epochs", "autoencoder_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("reset_epochs", "codebook_expansion_epochs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")

    def autoencoder_stage(self, max_steps: int) -> int:
        """Number of steps without quantization at the start of a run of `max_steps`."""
        steps = self.autoencoder_steps
        return math.ceil(steps * max_steps) if 0 < steps < 1 else int(steps)
