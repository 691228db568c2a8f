"""The settings of one call of `TokComModel.generate`, merged from all their sources and checked.

An argument takes precedence over `generation_config`, which takes precedence over the model's config, and that over
`DEFAULTS`. Names are those of this package and of transformers.
"""

from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from .tokcom_flow_matching import check_sampler

DEFAULTS = {
    "num_chunks": 256, "num_generate_chunks": 64, "batch_size": 1, "guidance_scale": 1.0, "best_of": 1,
    "num_return_sequences": 1, "return_dict_in_generate": False,
}  # fmt: skip
# Settings whose default is a field of the model's config.
CONFIGURED = ("num_steps", "sampler", "block_size")
# All names that a generation_config may hold.
READ = (
    *DEFAULTS, *CONFIGURED, "temperature", "do_sample", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id",
)  # fmt: skip
COUNTS = (
    "max_new_tokens", "max_length", "num_chunks", "num_generate_chunks", "num_steps", "batch_size", "num_return_sequences",
    "block_size", "best_of", "pad_token_id",
)  # fmt: skip
# Names in a generation_config that are no settings here; trainers copy bos_token_id from their tokenizer.
PASSED_OVER = ("transformers_version", "bos_token_id")
# Values at which a setting of transformers is off, where that is not None, 0 or False.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "use_cache": True,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of one call of `generate`; fields that are not listed here are arguments of `generate`.

    new_tokens: new tokens per sequence; the last chunk is cut to this number.
    temperature: factor of all noise that the flow draws.
    eos_token_ids: ids that end a sequence.
    fill_id: id of everything after the first end token of a sequence.
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
        """Merges the sources of the settings and checks the result.

        Args:
            model: the `TokComModel`.
            prompt: ids (batch, length), or None.
            generation_config: that of the call; None takes `model.generation_config`.
            given: arguments of `generate` by name, None where the caller left them out.

        Raises:
            TypeError: `generation_config` is no `GenerationConfig`, or a count is no whole number.
            ValueError: a value is out of range, or arguments contradict each other or would not act.
        """
        given = {name: value for name, value in given.items() if value is not None}
        configured = _configured(model, generation_config)
        if given.get("do_sample") is False:
            # A stored temperature is meant for sampling, which is off in this call.
            configured.pop("temperature", None)
        found = configured | given
        for name in COUNTS:
            if name in found and not isinstance(found[name], Integral):
                raise TypeError(f"{name} must be a whole number, got {found[name]!r}.")
        values = {name: found.get(name, default) for name, default in DEFAULTS.items()}
        for name in CONFIGURED:
            values[name] = found.get(name, getattr(model.config, name))
        new_tokens = _new_tokens(model, prompt, given, configured)
        del values["num_chunks"], values["num_generate_chunks"]
        eos = _end_tokens(model, given, configured, generation_config is None)
        fill = found.get("pad_token_id", eos[0] if eos else model.config.vae.omni_token_id)
        if not 0 <= fill < model.config.vae.vocab_size:
            raise ValueError(f"pad_token_id must be in 0 … {model.config.vae.vocab_size - 1}, got {fill}.")
        settings = cls(
            new_tokens=new_tokens, temperature=_temperature(found), eos_token_ids=eos, fill_id=fill, **values
        )
        settings._check(model, prompt, given)
        return settings

    def _check(self, model, prompt: torch.Tensor | None, given: dict) -> None:
        for name in ("num_steps", "batch_size", "num_return_sequences", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_sampler(self.sampler, model.config)
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
                f"guidance_scale={self.guidance_scale} needs a model trained with context_dropout above 0, so that it "
                "predicts text without its context, too."
            )
        if self.guidance_scale != 1.0 and self.sampler == "multirate":
            raise ValueError(
                "sampler='multirate' follows one prediction, and guidance_scale needs two; take 'multistep'."
            )
        if not isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}.")
        if self.temperature == 0 and max(self.num_return_sequences, self.best_of) > 1:
            raise ValueError(
                "At temperature 0 (do_sample=False) every draw is the same: num_return_sequences and best_of must be 1, got "
                f"{self.num_return_sequences} and {self.best_of}."
            )


def _configured(model, generation_config: GenerationConfig | None) -> dict[str, Any]:
    """The settings that a generation config holds, by name; raises ValueError if one of them would not act."""
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
            continue  # transformers copied the value from the model's config
        elif value and value != NEUTRAL.get(name):
            raise ValueError(
                f"generation_config.{name}={value!r} has no meaning for TokComModel; it reads {', '.join(READ)}."
            )
    return found


def _temperature(found: dict[str, Any]) -> float:
    """The factor of the flow's noise."""
    sampled, temperature = found.get("do_sample"), found.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {temperature!r}.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must not be negative, and must be finite, got {temperature}.")
    if temperature is not None and sampled is not None and sampled != (temperature > 0):
        raise ValueError(
            f"do_sample={sampled} and temperature={temperature} contradict each other: without sampling there is no noise, "
            "which is temperature 0. Give one of the two."
        )
    return float(temperature) if temperature is not None else float(sampled is not False)


def _new_tokens(model, prompt: torch.Tensor | None, given: dict, configured: dict) -> int:
    """Number of tokens to generate per sequence, from the one length that is given."""
    chunk, width = model.config.vae.chunk_size, 0 if prompt is None else prompt.shape[1]
    own, other = ("num_chunks", "num_generate_chunks") if prompt is None else ("num_generate_chunks", "num_chunks")
    if other in given and own not in given:
        kind = "without" if prompt is None else "with"
        raise ValueError(f"{other} does not apply {kind} a prompt; give {own} or max_new_tokens.")
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
    if value is None or value < 1:
        what = "max_new_tokens" if name == "max_new_tokens" else "The number of chunks to generate"
        raise ValueError(f"{what} must be at least 1, got {value}.")
    return value if name == "max_new_tokens" else value * chunk


def _end_tokens(model, given: dict, configured: dict, own_config: bool) -> tuple[int, ...]:
    """Ids that end a sequence."""
    end = configured.get("eos_token_id")
    if end is None or (own_config and end == model.eos_of_config):
        # The generation config only repeats the model's config at construction, which may have been changed since.
        end = model.config.eos_token_id
    end = given.get("eos_token_id", end)
    ids = () if end is None else tuple(torch.as_tensor(end).reshape(-1).tolist())
    size = model.config.vae.vocab_size
    if any(not 0 <= token < size for token in ids):
        raise ValueError(f"eos_token_id must be in 0 … {size - 1}, got {end}.")
    return ids
