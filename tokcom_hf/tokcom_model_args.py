"""Converts `model_args` and `config` of the documented TokCom checkpoint to this package's configurations, and back."""

import logging
from dataclasses import dataclass, fields
from typing import Any

from .models.configuration_tokcom import TokComConfig
from .models.configuration_tokcom_denoiser import DenoisedModelConfig
from .models.configuration_tokcom_vae import TokComVAEConfig

logger = logging.getLogger(__name__)

# Required keys of model_args, those that the document prints; rms_norm_eps and rope_theta have documented defaults.
PRINTED_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "omni_token_id",
)  # fmt: skip
# Defaults of the keys of a file's config.
DOCUMENTED_SETTINGS: dict[str, Any] = {
    "tokenizer_path": "meta-llama/CodeLlama-7b-hf", "max_length": 1024, "chunk_size": 4, "noise_std": 0.05,
}  # fmt: skip


@dataclass
class ModelArgs:
    """Architecture of VAE and denoiser: the `model_args` of documented files, with the documented defaults.

    `vocab_size` includes the omni token; `omni_token_id` None means the last id.
    """

    hidden_size: int = 896
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    intermediate_size: int = 4864
    vocab_size: int = 32017
    omni_token_id: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self):
        if self.omni_token_id is None:
            self.omni_token_id = self.vocab_size - 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelArgs":
        """Reads the `model_args` of a file; logs a warning with the keys that are ignored.

        Raises:
            ValueError: a required key is missing, or a value is out of range.
        """
        absent = [key for key in PRINTED_KEYS if key not in values]
        if absent:
            raise ValueError(f"model_args lack {', '.join(absent)}; is this a TokCom checkpoint?")
        for name in PRINTED_KEYS:
            if type(values[name]) is not int or values[name] < (0 if name == "omni_token_id" else 1):
                raise ValueError(f"model_args.{name} must be a whole number of at least 1, got {values[name]!r}.")
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(f"model_args.{name}", values.get(name, 1.0))
        known = {item.name for item in fields(cls)}
        unread = sorted(set(map(str, values)) - known - {"chunk_size"})
        if unread:
            logger.warning("model_args that are ignored: %s.", ", ".join(unread))
        return cls(**{name: value for name, value in values.items() if name in known})

    def shape(self) -> dict[str, Any]:
        """Returns the fields that `TokComVAEConfig` and `DenoisedModelConfig` share."""
        return {
            "hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size, "rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta,
        }  # fmt: skip

    def vae_config(self, chunk_size: int = 4) -> TokComVAEConfig:
        """Returns the configuration of the documented VAE."""
        return TokComVAEConfig(
            **self.shape(), vocab_size=self.vocab_size, omni_token_id=self.omni_token_id, chunk_size=chunk_size
        )

    def denoiser_config(self) -> DenoisedModelConfig:
        """Returns the configuration of the documented denoiser."""
        return DenoisedModelConfig(**self.shape(), latent_size=self.hidden_size)


def check_number(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError if `max_length`, `chunk_size` or `noise_std` in the `config` of a file is out of range."""
    for name in ("chunk_size", "max_length"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise ValueError(f"config.{name} must be a whole number of at least 1, got {settings[name]!r}.")
    check_number("config.noise_std", settings["noise_std"])


def documented_config(arguments: ModelArgs, settings: dict[str, Any], eos_token_id: int | None = None) -> TokComConfig:
    """Returns the `TokComConfig` of a checkpoint file; `settings` is the file's `config`."""
    return TokComConfig(
        vae=arguments.vae_config(settings["chunk_size"]),
        denoiser=arguments.denoiser_config(),
        noise_std=settings["noise_std"],
        max_chunks=settings["max_length"] // settings["chunk_size"],
        eos_token_id=eos_token_id,
    )


def model_arguments(config: Any) -> ModelArgs:
    """Returns the `model_args` of a `TokComConfig` or `TokComVAEConfig`: the architecture of the VAE."""
    vae = getattr(config, "vae", config)
    return ModelArgs(**{item.name: getattr(vae, item.name) for item in fields(ModelArgs)})
