"""Configuration of `VQGAN`."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pipeline_files import PipelineTasks

QUANTIZER_NAMES = ("ema", "fsq", "lfq")


def default_fsq_levels(codebook_size: int) -> list[int]:
    """Levels 4 and 8 whose product is `codebook_size`, a power of two ≥ 4: 64 → [4, 4, 4], 8192 → [8, 4, 4, 4, 4, 4]."""
    bits = codebook_size.bit_length() - 1
    if codebook_size < 4 or codebook_size != 1 << bits:
        raise ValueError(
            f"codebook_size {codebook_size} is not a power of two ≥ 4; give fsq_levels, whose product it must be."
        )
    return [8] * (bits % 2) + [4] * ((bits - 3 * (bits % 2)) // 2)


@strict
class VQGANConfig(PreTrainedConfig):
    """Images to discrete codes and back. The defaults are the documented numbers; `recipes/configs/base` are sturdier.

    What you will most likely change:
        image_size: pixels of the processor's output; the model takes any size divisible by `downsample_factor`.
        in_channels, out_channels: 1 to 4.
        codebook_size: number of codes K (for `lfq` a power of two, for `fsq` the product of `fsq_levels`).
        codebook_dim: width of a code; 8–32 with `codebook_similarity="cosine"` uses large codebooks best. (`ema` only.)
        quantizer: `ema`, `fsq` or `lfq`.

    Network:
        downsample_factor: pixels per code along each side, `patch_size` times a power of two.
        patch_size: pixels folded into channels before the first convolution; above 1 it saves most of the time.
        base_channels, channel_multipliers: width of each resolution, finest first; one multiplier more than halvings.
        num_res_blocks: residual blocks per resolution.
        latent_channels: channels of encoder output and decoder input; None means `codebook_dim`.
        mid_attention: self-attention at the coarsest resolution.
        dropout: in the residual blocks.

    Loss of `forward` (reconstruction = l1_weight·L1 + mse_weight·MSE):
        commitment_weight: β; pulls features to their codes. `VQGANTrainingArguments` warms it up.
        entropy_weight: of (per-sample entropy − entropy of the batch mean)/log K of soft assignments.
        entropy_term: `choice` (as above: sure choices and evenly used codes) or `use` (−entropy of the batch mean/log K
            alone; `ema` only).
        entropy_temperature: of those assignments.
        diversity_weight: of 1 − entropy of the batch mean/log K of the same assignments, beside the entropy term: it asks
            for evenly used codes, not for sure choices. (`ema` only.)

    Codebook (`ema`):
        codebook_similarity: `euclidean` or `cosine` (features and codes on the unit sphere).
        codebook_projection: linear maps around the codebook even where widths agree.
        codebook_init: `uniform` ±1/K (documented; features then miss most codes), `data` or `kmeans`.
        kmeans_iterations, codebook_seed: of the initialisation and of resets.
        ema_decay: of the codes' moving averages; `ema_bias_correction` forgets their arbitrary start.
        temperature: codes are drawn from softmax(−distance/(temperature·scale)) in training only; 0 takes the
            nearest. The trainer may anneal it. `temperature_scale`: what squared distances are divided by, `dim` (√width),
            `mean` (their mean), `variance` (the features' mean variance per channel: distances of features of unit
            variance, summed over all channels) or `none`, so that the features' own size tells how even the draw is.
        gradient_estimator: `straight_through` or `rotation`; rotation excludes temperature > 0.
        dead_code_threshold: a code below it is dead; in vectors per step (`dead_code_unit="count"`, documented) or as
            a share of the mean use (`"mean"`, independent of batch and codebook size).
        reset_fraction: at most this share of the codes is moved onto data at a time, dead codes only; 0 is never.
        reset_interval: optimizer steps between resets; 0 leaves the moment to the trainer (each epoch).
        reset_pool: vectors remembered per step and rank to reset onto.
        balance_rate: how fast codes that are chosen more often than the others become dearer, so that all are used
            equally; 0 leaves each vector its nearest code. Per step, in units of the squared distance between vectors
            and codes; 0.05 is usual. What was learned holds in inference as well.
        freeze_codebook: codes never move.
        usage_decay: of the usage statistics that are only reported.
    """

    model_type = "tokcom_vqgan"
    attribute_map = {"vocab_size": "codebook_size", "hidden_size": "latent_channels", "num_channels": "in_channels"}

    image_size: int = 256
    in_channels: int = 3
    out_channels: int = 3
    codebook_size: int = 64
    codebook_dim: int = 256
    quantizer: str = "ema"
    fsq_levels: list[int] | None = None

    downsample_factor: int = 8
    patch_size: int = 1
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int | None = None
    mid_attention: bool = True
    dropout: float | int = 0.0

    l1_weight: float | int = 0.7
    mse_weight: float | int = 0.0
    commitment_weight: float | int = 10.0
    entropy_weight: float | int = 2.0
    entropy_term: str = "choice"
    entropy_temperature: float | int = 1.0
    diversity_weight: float | int = 0.0

    codebook_similarity: str = "euclidean"
    codebook_projection: bool = False
    codebook_init: str = "uniform"
    kmeans_iterations: int = 10
    codebook_seed: int = 0
    ema_decay: float | int = 0.7
    ema_bias_correction: bool = True
    temperature: float | int = 2.5
    temperature_scale: str = "dim"
    gradient_estimator: str = "straight_through"
    dead_code_threshold: float | int = 1.0
    dead_code_unit: str = "count"
    reset_fraction: float | int = 0.3
    reset_interval: int = 0
    reset_pool: int = 16384
    balance_rate: float | int = 0.0
    freeze_codebook: bool = False
    usage_decay: float | int = 0.99

    def __post_init__(self, **kwargs):
        self.custom_pipelines = PipelineTasks("vqgan", kwargs.pop("custom_pipelines", None))
        # Set before the checks; the base class would set them behind.
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))
        self.channel_multipliers = list(self.channel_multipliers)
        if self.quantizer == "fsq" and self.fsq_levels is None:
            self.fsq_levels = default_fsq_levels(self.codebook_size)
        if self.latent_channels is None:
            self.latent_channels = self.codebook_dim
        self._check_network()
        self._check_codebook()
        super().__post_init__(**kwargs)

    def _check_network(self) -> None:
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) not in (1, 2, 3, 4):
                raise ValueError(f"{name} must be 1 to 4, got {getattr(self, name)}.")
        for name in ("patch_size", "base_channels", "num_res_blocks", "codebook_dim", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        halvings = math.log2(max(1, self.downsample_factor) / self.patch_size)
        if halvings < 0 or halvings != int(halvings):
            raise ValueError(
                f"downsample_factor must be patch_size ({self.patch_size}) times a power of two, "
                f"got {self.downsample_factor}."
            )
        if len(self.channel_multipliers) != halvings + 1:
            raise ValueError(
                f"channel_multipliers needs {int(halvings) + 1} entries for downsample_factor "
                f"{self.downsample_factor} and patch_size {self.patch_size}, got {self.channel_multipliers}."
            )
        if self.image_size < 1 or self.image_size % self.downsample_factor:
            raise ValueError(
                f"image_size must be a multiple of downsample_factor {self.downsample_factor}, got {self.image_size}."
            )

    def _check_codebook(self) -> None:
        choices = {
            "quantizer": QUANTIZER_NAMES,
            "codebook_similarity": ("euclidean", "cosine"),
            "codebook_init": ("uniform", "data", "kmeans"),
            "temperature_scale": ("dim", "mean", "variance", "none"),
            "entropy_term": ("choice", "use"),
            "gradient_estimator": ("straight_through", "rotation"),
            "dead_code_unit": ("count", "mean"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}.")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"lfq needs a codebook_size that is a power of two, got {self.codebook_size}.")
        if self.quantizer == "fsq" and math.prod(self.fsq_levels) != self.codebook_size:
            raise ValueError(
                f"The product of fsq_levels {self.fsq_levels} is {math.prod(self.fsq_levels)}, "
                f"not codebook_size {self.codebook_size}."
            )
        if self.gradient_estimator == "rotation" and self.temperature > 0:
            raise ValueError(
                "gradient_estimator='rotation' needs temperature=0 (a drawn code can point away from its feature), "
                f"got temperature {self.temperature}."
            )
        for name in ("ema_decay", "usage_decay", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.quantizer != "ema" and (self.diversity_weight or self.entropy_term != "choice"):
            raise ValueError(
                f"diversity_weight {self.diversity_weight} and entropy_term {self.entropy_term!r} need quantizer 'ema', "
                f"got {self.quantizer!r}; lfq has entropy_weight."
            )
        if not 0.0 <= self.reset_fraction <= 1.0:
            raise ValueError(f"reset_fraction must be in [0, 1], got {self.reset_fraction}.")
        for name in (
            "commitment_weight", "entropy_weight", "diversity_weight", "temperature", "dead_code_threshold",
            "reset_interval", "balance_rate",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be positive, got {self.entropy_temperature}.")
