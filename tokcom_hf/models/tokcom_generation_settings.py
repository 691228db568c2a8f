"""What a call of `TokComModel.generate` asks for: its own names and those of transformers, put together and checked.

An argument counts before `generation_config`, that before the model's config, and that before `DEFAULTS`.
"""

from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from .tokcom_flow_matching import SAMPLERS

DEFAULTS = {
    "num_chunks": 256, "num_generate_chunks": 64, "batch_size": 1, "guidance_scale": 1.0, "best_of": 1,
    "num_return_sequences": 1, "return_dict_in_generate": False,
}  # fmt: skip
# What the model's config says.
CONFIGURED = ("num_steps", "sampler", "block_size")
# What a generation_config may hold beside them: the names of transformers and those that the model's config supplies.
READ = (
    *DEFAULTS, *CONFIGURED, "temperature", "do_sample", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id",
)  # fmt: skip
COUNTS = (
    "max_new_tokens", "max_length", "num_chunks", "num_generate_chunks", "num_steps", "batch_size", "num_return_sequences",
    "block_size", "best_of", "pad_token_id",
)  # fmt: skip
# No settings of a sampler; trainers copy the begin token from their tokenizer.
PASSED_OVER = ("transformers_version", "bos_token_id")
# Values with which a setting that is not read changes nothing in transformers either, where that is not None, 0 or False.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "use_cache": True,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that one call of `generate` samples by.

    new_tokens: per sequence; the last chunk is cut to it.
    temperature: factor of all noise that the flow draws.
    eos_token_ids: end a sequence; what follows the first is `fill_id`.
    """

    new_tokens: int
    num_steps: int
    batch_size: int
    sampler: str
    block_size: int
    guidance_scale: float
    best_of: int
    temperature: float
    num_return_sequences: int
    return_dict_in_generate: bool
    eos_token_ids: tuple[int, ...]
    fill_id: int

    @classmethod
    def of(
        cls, model, prompt: torch.Tensor | None, generation_config: GenerationConfig | None, given: dict
    ) -> "GenerationSettings":
        """Puts the arguments of a call together.

        Args:
            model: the `TokComModel`.
            prompt: ids (batch, length), or None.
            generation_config: of this call; None takes the model's.
            given: arguments of `generate` by name, None where they were not given.

        Raises:
            TypeError: `generation_config` is none, or a count is no whole number.
            ValueError: values out of range, arguments that contradict each other, or that this call would not use.
        """
        given = {name: value for name, value in given.items() if value is not None}
        configured = _configured(model, generation_config)
        if given.get("do_sample") is False:
            # A stored temperature is that of sampling.
            configured.pop("temperature", None)
        asked = configured | given
        for name in COUNTS:
            if name in asked and not isinstance(asked[name], Integral):
                raise TypeError(f"{name} must be a whole number, got {asked[name]!r}.")
        values = {name: asked.get(name, default) for name, default in DEFAULTS.items()}
        for name in CONFIGURED:
            values[name] = asked.get(name, getattr(model.config, name))
        new_tokens = _new_tokens(model, prompt, given, configured)
        del values["num_chunks"], values["num_generate_chunks"]
        eos = _end_tokens(model, given, configured, generation_config is None)
        fill = asked.get("pad_token_id", eos[0] if eos else model.config.vae.omni_token_id)
        if not 0 <= fill < model.config.vae.vocab_size:
            raise ValueError(f"pad_token_id must be in 0 … {model.config.vae.vocab_size - 1}, got {fill}.")
        settings = cls(
            new_tokens=new_tokens, temperature=_temperature(asked), eos_token_ids=eos, fill_id=fill, **values
        )
        settings._check(model, prompt, given)
        return settings

    def _check(self, model, prompt: torch.Tensor | None, given: dict) -> None:
        for name in ("num_steps", "batch_size", "num_return_sequences", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_WORDS.get(name, name)} must be at least 1, got {getattr(self, name)}.")
        check_sampler(self.sampler)
        if prompt is not None and given.get("batch_size", len(prompt)) not in (1, len(prompt)):
            raise ValueError(
                f"batch_size={self.batch_size} is for generation without a prompt; there are {len(prompt)} prompts."
            )
        if self.block_size < 0 or (self.block_size and model.context is None):
            raise ValueError(
                f"block_size must be 0 (all chunks at once) or, in a model with a context, positive; got {self.block_size}."
            )
        if self.guidance_scale != 1.0 and not model.config.context_dropout:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs a model trained with context_dropout above 0, which knows what "
                "text is likely without its context."
            )
        if not isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}.")
        if self.temperature == 0 and max(self.num_return_sequences, self.best_of) > 1:
            raise ValueError(
                "At temperature 0 (do_sample=False) every draw is the same: num_return_sequences and best_of must be 1, got "
                f"{self.num_return_sequences} and {self.best_of}."
            )


def check_sampler(sampler: str) -> str:
    """Returns the name of a sampler, or raises ValueError."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    return sampler


_WORDS = {"batch_size": "The batch_size"}


def _configured(model, generation_config: GenerationConfig | None) -> dict[str, Any]:
    """The settings of a generation config that are set; those that would not act are refused."""
    config = model.generation_config if generation_config is None else generation_config
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(config).__name__}.")
    found = {}
    for name, value in config.to_diff_dict().items():
        if name in PASSED_OVER or name.startswith("_") or value is None:
            continue
        if name in READ:
            found[name] = value
        elif generation_config is None and value == getattr(model.config, name, None):
            continue  # copied from the model's config by transformers
        elif value and value != NEUTRAL.get(name):
            raise ValueError(
                f"generation_config.{name}={value!r} has no meaning for TokComModel; it reads {', '.join(READ)}."
            )
    return found


def _temperature(asked: dict[str, Any]) -> float:
    """The factor of the flow's noise."""
    sampled, temperature = asked.get("do_sample"), asked.get("temperature")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must not be negative, and finite, got {temperature}.")
    if temperature is not None and sampled is not None and sampled != (temperature > 0):
        raise ValueError(
            f"do_sample={sampled} and temperature={temperature} contradict each other: without sampling there is no noise, "
            "which is temperature 0. Give one of the two."
        )
    return float(temperature) if temperature is not None else float(sampled is not False)


def _new_tokens(model, prompt: torch.Tensor | None, given: dict, configured: dict) -> int:
    """Tokens to generate per sequence, from the one argument that says so."""
    chunk, width = model.config.vae.chunk_size, 0 if prompt is None else prompt.shape[1]
    own, other = ("num_chunks", "num_generate_chunks") if prompt is None else ("num_generate_chunks", "num_chunks")
    if other in given and own not in given:
        kind = "without" if prompt is None else "with"
        raise ValueError(f"{other} does not apply {kind} a prompt; say {own} or max_new_tokens.")
    lengths = ("max_new_tokens", "max_length", own)
    stated = [name for name in lengths if name in given]
    if len(stated) > 1:
        raise ValueError(f"{' and '.join(stated)} say the same thing twice; give one of them.")
    source = given if stated else configured
    name = next((name for name in lengths if name in source), own)
    value = source.get(name, DEFAULTS.get(name))
    if name == "max_length":
        if value <= width:
            raise ValueError(f"max_length={value} counts the prompt, which has {width} tokens: nothing is left.")
        return value - width
    if value < 1:
        what = "max_new_tokens" if name == "max_new_tokens" else "The number of chunks to generate"
        raise ValueError(f"{what} must be at least 1, got {value}.")
    return value if name == "max_new_tokens" else value * chunk


def _end_tokens(model, given: dict, configured: dict, own_config: bool) -> tuple[int, ...]:
    """Ids that end a sequence."""
    end = configured.get("eos_token_id")
    if end is None or (own_config and end == model.eos_of_config):
        # The model's generation config repeats its config, which may have been changed since.
        end = model.config.eos_token_id
    end = given.get("eos_token_id", end)
    ids = () if end is None else tuple(torch.as_tensor(end).reshape(-1).tolist())
    size = model.config.vae.vocab_size
    if any(not 0 <= token < size for token in ids):
        raise ValueError(f"eos_token_id must be in 0 … {size - 1}, got {end}.")
    return ids
