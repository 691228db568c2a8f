"""Configuration of `VQGAN`."""

import math
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pipeline_files import PipelineTasks
from .shared_removed_fields import take_removed

QUANTIZER_NAMES = ("ema", "fsq", "lfq")
# Option → the quantizers that read it. Every quantizer reads the options that are not listed.
READ_BY: dict[str, tuple[str, ...]] = {
    "fsq_levels": ("fsq",),
    "entropy_weight": ("ema", "lfq"),
    "entropy_temperature": ("ema", "lfq"),
    "entropy_term": ("ema",),
    "diversity_weight": ("ema",),
    "codebook_similarity": ("ema",),
    "codebook_init": ("ema",),
    "ema_decay": ("ema",),
    "temperature": ("ema",),
    "temperature_scale": ("ema",),
    "dead_code_threshold": ("ema",),
    "dead_code_unit": ("ema",),
    "reset_fraction": ("ema",),
    "reset_interval": ("ema",),
    "balance_rate": ("ema",),
}
# At 0 these options are off, which is true of every quantizer that does not read them.
OFF_AT_ZERO = ("entropy_weight", "temperature", "reset_fraction")
# Field of version 0.2.0 → its default there.
REMOVED: dict[str, Any] = {
    "dropout": 0.0, "codebook_projection": False, "kmeans_iterations": 10, "codebook_seed": 0, "ema_bias_correction": True,
    "gradient_estimator": "straight_through", "reset_pool": 16384, "freeze_codebook": False, "usage_decay": 0.99,
}  # fmt: skip


def unread_options(quantizer: str) -> tuple[str, ...]:
    """Options that a quantizer does not read; with `codebook_dim` for `fsq` and `lfq`, whose number of codes gives it."""
    width = () if quantizer == "ema" else ("codebook_dim",)
    return (*(name for name, quantizers in READ_BY.items() if quantizer not in quantizers), *width)


def default_fsq_levels(codebook_size: int) -> list[int]:
    """Levels of each dimension of `fsq`, 4 or 8, whose product is `codebook_size`: 64 → [4, 4, 4], 32 → [8, 4].

    Raises:
        ValueError: `codebook_size` is no power of two, or below 4.
    """
    bits = codebook_size.bit_length() - 1
    if codebook_size < 4 or codebook_size != 1 << bits:
        raise ValueError(
            f"fsq needs a codebook_size that is a power of two and at least 4, got {codebook_size}; or give fsq_levels, "
            "whose product it must be."
        )
    return [8] * (bits % 2) + [4] * ((bits - 3 * (bits % 2)) // 2)


@strict
class VQGANConfig(PreTrainedConfig):
    """Shape, losses and codebook of a `VQGAN`. The defaults are the documented numbers.

    What you will most likely change:
        image_size: side in pixels of the processor's output; the model takes any size divisible by `downsample_factor`.
        in_channels, out_channels: channels of input and output, 1 to 4.
        codebook_size: number of codes K; a power of two for `lfq`, the product of `fsq_levels` for `fsq`.
        codebook_dim: width of a code of `ema`; 8–32 with `codebook_similarity="cosine"` uses large codebooks best.
        quantizer: `ema` (learned codebook), `fsq` (rounding) or `lfq` (signs).
        fsq_levels: levels of each dimension of `fsq`, each at least 2; None takes fours and eights.

    Network:
        downsample_factor: pixels per code along each side, `patch_size` times a power of two; 8 makes 32×32 codes of
            256×256 pixels.
        patch_size: pixels folded into channels before the first convolution; above 1 it saves most of the time.
        base_channels, channel_multipliers: their products are the channels at each resolution, finest first; one multiplier
            more than there are halvings of the resolution.
        num_res_blocks: residual blocks per resolution.
        latent_channels: channels of encoder output and decoder input; None takes `codebook_dim`.
        mid_attention: self-attention at the coarsest resolution.

    Loss of `forward`:
        l1_weight, mse_weight: weights of the absolute and the squared error of the reconstruction.
        commitment_weight: weight β of the squared distance between features and their codes;
            `VQGANTrainingArguments.commitment_warmup_epochs` warms it up.
        entropy_weight: weight of the entropy term (`ema`, `lfq`).
        entropy_term: `choice` is (mean entropy of each vector's soft assignment − entropy of the mean assignment) / log K,
            which rewards sure choices and evenly used codes; `use` is the second part alone (`ema`).
        entropy_temperature: temperature of these soft assignments (`ema`, `lfq`).
        diversity_weight: weight of 1 − entropy of the mean assignment / log K, which rewards evenly used codes and leaves
            open how sure the choices are (`ema`).

    Codebook of `ema`:
        codebook_similarity: `euclidean`, or `cosine` with features and codes on the unit sphere.
        codebook_init: `uniform` in ±1/K (documented; features then miss most codes), `data` or `kmeans`.
        ema_decay: share of the old value that a step keeps in the moving averages of the codes, in [0, 1); a larger one
            moves codes more slowly.
        temperature: in training, codes are drawn from softmax(−distance² / (temperature · scale)); 0 takes the nearest.
        temperature_scale: the scale in this formula: `dim` (√width), `mean` (the mean squared distance), `variance` (the
            features' mean variance per channel) or `none` (1: features far from each other then make the draw surer).
        dead_code_threshold, dead_code_unit: a code that is used less than the threshold is dead. The unit is vectors per
            step (`count`, documented) or the mean use of all codes (`mean`, independent of batch and codebook size).
        reset_fraction: largest share of the codes, dead ones only, that a reset moves onto data; 0 never resets.
        reset_interval: optimizer steps between resets; 0 leaves them to the trainer (each epoch).
        balance_rate: step of a penalty that is added to the distance to codes which are used too often, as a share of the
            mean squared distance; 0.05 is usual. 0 (default): every vector takes its nearest code. Inference applies the
            penalty as well.

    Raises:
        ValueError: a value out of range, or an option that the chosen quantizer does not read (`READ_BY`).
    """

    model_type = "tokcom_vqgan"
    attribute_map = {"vocab_size": "codebook_size", "hidden_size": "latent_channels", "num_channels": "in_channels"}

    image_size: int = 256
    in_channels: int = 3
    out_channels: int = 3
    codebook_size: int = 64
    codebook_dim: int = 256
    quantizer: str = field(default="ema", metadata={"replaces": unread_options})
    fsq_levels: list[int] | None = None

    downsample_factor: int = 8
    patch_size: int = 1
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int | None = None
    mid_attention: bool = True

    l1_weight: float | int = 0.7
    mse_weight: float | int = 0.0
    commitment_weight: float | int = 10.0
    entropy_weight: float | int = 2.0
    entropy_term: str = "choice"
    entropy_temperature: float | int = 1.0
    diversity_weight: float | int = 0.0

    codebook_similarity: str = "euclidean"
    codebook_init: str = "uniform"
    ema_decay: float | int = 0.7
    temperature: float | int = 2.5
    temperature_scale: str = "dim"
    dead_code_threshold: float | int = 1.0
    dead_code_unit: str = "count"
    reset_fraction: float | int = 0.3
    reset_interval: int = 0
    balance_rate: float | int = 0.0

    def __post_init__(self, **kwargs):
        self.custom_pipelines = PipelineTasks("vqgan", kwargs.pop("custom_pipelines", None))
        # The base class would set these after the checks.
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))
        self.channel_multipliers = list(self.channel_multipliers)
        if self.latent_channels is None:
            self.latent_channels = self.codebook_dim
        self._check_network()
        self._check_codebook()
        self._check_options_of_quantizer()
        take_removed(kwargs, REMOVED)
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
            "dead_code_unit": ("count", "mean"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 2 <= self.codebook_size <= 1 << 24:
            raise ValueError(f"codebook_size must be at least 2 and at most {1 << 24}, got {self.codebook_size}.")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"lfq needs a codebook_size that is a power of two, got {self.codebook_size}.")
        if self.quantizer == "fsq":
            self._check_levels()
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
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

    def _check_levels(self) -> None:
        """Fills in the levels of `fsq`, or checks those that are given."""
        if self.fsq_levels is None:
            self.fsq_levels = default_fsq_levels(self.codebook_size)
        self.fsq_levels = list(self.fsq_levels)
        if min(self.fsq_levels, default=0) < 2 or math.prod(self.fsq_levels) != self.codebook_size:
            raise ValueError(
                f"fsq_levels must be at least 2 each, with codebook_size {self.codebook_size} as their product, got "
                f"{self.fsq_levels}."
            )

    def _check_options_of_quantizer(self) -> None:
        """Raises ValueError for options of other quantizers; those of a saved folder never acted and get their defaults."""
        defaults = {item.name: item.default for item in fields(self)}
        idle = {
            name: getattr(self, name)
            for name, quantizers in READ_BY.items()
            if self.quantizer not in quantizers
            and getattr(self, name) != defaults[name]
            and not (name in OFF_AT_ZERO and getattr(self, name) == 0)
        }
        # `fsq` and `lfq` have a width of their own. A codebook_dim that only repeats it or latent_channels is accepted.
        width = math.log2(self.codebook_size) if self.quantizer == "lfq" else self.latent_channels
        if self.quantizer != "ema" and self.codebook_dim not in (
            defaults["codebook_dim"],
            self.latent_channels,
            width,
        ):
            idle["codebook_dim"] = self.codebook_dim
        if self.transformers_version is not None:
            for name in idle:
                setattr(self, name, defaults[name])
        elif idle:
            given = ", ".join(f"{name}={value!r} (default {defaults[name]!r})" for name, value in idle.items())
            readers = set.intersection(*(set(READ_BY.get(name, ("ema",))) for name in idle))
            advice = f", or choose quantizer {' or '.join(sorted(readers))}" if readers else ""
            raise ValueError(f"The quantizer {self.quantizer!r} does not read {given}; leave it out{advice}.")
