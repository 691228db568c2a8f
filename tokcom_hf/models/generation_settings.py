"""What a call of `TokComModel.generate` asks for: its own names and those of transformers, put together and checked.

An argument counts before `generation_config`, that before the model's config, and that before `DEFAULTS`.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from .flow_matching import SAMPLERS, TIME_GRIDS

DEFAULTS = {
    "num_chunks": 256, "num_generate_chunks": 64, "num_steps": 50, "batch_size": 1, "time_grid": "uniform",
    "guidance_scale": 1.0, "final_clean_pass": False, "posterior_temperature": 1.0, "token_lag": 0.0,
    "num_return_sequences": 1, "return_dict_in_generate": False,
}  # fmt: skip
# What a generation_config may hold beside them: the names of transformers and those that the model's config supplies.
READ = (
    *DEFAULTS, "sampler", "block_size", "temperature", "do_sample", "max_new_tokens", "max_length", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
COUNTS = (
    "max_new_tokens", "max_length", "num_chunks", "num_generate_chunks", "num_steps", "batch_size", "num_return_sequences",
    "block_size", "pad_token_id",
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
    random: False: the flow starts at zero noise and no token is drawn.
    eos_token_ids: end a sequence; what follows the first is `fill_id`.
    """

    new_tokens: int
    num_steps: int
    batch_size: int
    sampler: str
    time_grid: str
    block_size: int
    guidance_scale: float
    final_clean_pass: bool
    temperature: float
    posterior_temperature: float
    token_lag: float
    random: bool
    num_return_sequences: int
    return_dict_in_generate: bool
    eos_token_ids: tuple[int, ...]
    fill_id: int

    @classmethod
    def of(
        cls, model, prompt: torch.Tensor | None, width: int, generation_config: GenerationConfig | None, given: dict
    ) -> "GenerationSettings":
        """Puts the arguments of a call together.

        Args:
            model: the `TokComModel`.
            prompt: ids (batch, length), or None.
            width: tokens of the longest prompt as the output holds it; `max_length` counts them.
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
        random, temperature = _temperature(asked)
        values = {name: asked.get(name, default) for name, default in DEFAULTS.items()}
        for name in ("sampler", "block_size"):
            values[name] = asked.get(name, getattr(model.config, name))
        new_tokens = _new_tokens(model, prompt, width, given, configured)
        del values["num_chunks"], values["num_generate_chunks"]
        eos = _end_tokens(model, given, configured, generation_config is None)
        fill = asked.get("pad_token_id", eos[0] if eos else model.config.vae.omni_token_id)
        if not 0 <= fill < model.config.vae.vocab_size:
            raise ValueError(f"pad_token_id must be in 0 … {model.config.vae.vocab_size - 1}, got {fill}.")
        settings = cls(
            new_tokens=new_tokens, random=random, temperature=temperature, eos_token_ids=eos, fill_id=fill, **values
        )
        settings._check(model, prompt, given)
        return settings

    def _check(self, model, prompt: torch.Tensor | None, given: dict) -> None:
        for name in ("num_steps", "batch_size", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_WORDS.get(name, name)} must be at least 1, got {getattr(self, name)}.")
        if self.block_size < 0:
            raise ValueError(f"block_size must not be negative (0 = all chunks in parallel), got {self.block_size}.")
        if self.sampler not in (*SAMPLERS, "commit"):
            raise ValueError(
                f"sampler must be one of {', '.join(SAMPLERS)}, or commit in generate; got {self.sampler!r}."
            )
        if self.time_grid not in TIME_GRIDS:
            raise ValueError(f"time_grid must be one of {', '.join(TIME_GRIDS)}, got {self.time_grid!r}.")
        if prompt is not None and given.get("batch_size", len(prompt)) not in (1, len(prompt)):
            raise ValueError(
                f"batch_size={self.batch_size} is for generation without a prompt; there are {len(prompt)} prompts."
            )
        if not self.random and self.num_return_sequences > 1:
            raise ValueError(
                f"do_sample=False gives one sequence per prompt, so that num_return_sequences={self.num_return_sequences} "
                "would repeat it; leave do_sample out or set it to True."
            )
        if not self.random and self.sampler == "renoise":
            raise ValueError("sampler='renoise' draws noise at every step; do_sample=False takes 'euler' or 'heun'.")
        chunks = -(-self.new_tokens // model.config.vae.chunk_size)
        one_block = self.block_size == 0 or self.block_size >= chunks
        if self.guidance_scale != 1.0 and prompt is None and one_block:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs something to be guided by: a prompt, or a block_size below "
                f"the {chunks} chunks."
            )
        if self.sampler == "commit":
            self._check_commit()

    def _check_commit(self) -> None:
        """Tokens are drawn one after the other from their own distributions, without times, decoder or noise."""
        unused = {
            "time_grid": self.time_grid != "uniform",
            "final_clean_pass": self.final_clean_pass,
            "temperature": self.temperature not in (0.0, 1.0),
        }
        for name, used in unused.items():
            if used:
                hint = "; posterior_temperature is that of its draws" if name == "temperature" else ""
                raise ValueError(
                    f"sampler='commit' does not use {name}, got {getattr(self, name)!r}: leave it out{hint}."
                )


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


def _temperature(asked: dict[str, Any]) -> tuple[bool, float]:
    """Whether anything is random, and the temperature of the decoder's tokens."""
    sampled, temperature = asked.get("do_sample"), asked.get("temperature")
    if temperature is not None and not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")
    if sampled is False and temperature:
        raise ValueError(
            f"do_sample=False takes the likeliest tokens, temperature={temperature} draws them; give one of the two."
        )
    if sampled and temperature == 0:
        raise ValueError("do_sample=True draws tokens at a temperature above 0, got temperature=0.")
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    return sampled is not False, float(temperature)


def _new_tokens(model, prompt: torch.Tensor | None, width: int, given: dict, configured: dict) -> int:
    """Tokens to generate per sequence, from the one argument that says so."""
    chunk = model.config.vae.chunk_size
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
