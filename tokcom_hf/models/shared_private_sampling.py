"""Sampling in transformers' `generate` from a private generator, so that threads do not share random numbers.

`generate(do_sample=True)` draws from torch's global generator. Here `generate` decodes greedily from noisy logits, with the
same distribution: the warpers of sampling (temperature, top-k, top-p, ...) run as logits processors, and a last one adds
Gumbel noise of the private generator, because argmax(logits + Gumbel noise) is distributed as softmax(logits).
"""

import copy
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import logits_process

# Defaults of `generate`; with these values, only top_k changes logits.
DEFAULTS = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits `(batch, vocabulary)`, so that the largest is a sample of their softmax."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # −log of an exponential variable is a Gumbel variable; it is drawn on the device of the generator.
        noise = torch.empty(scores.shape, device=self.generator.device).exponential_(generator=self.generator)
        return scores.float() - noise.to(scores.device).log()


def sampling_options(model, options: dict[str, Any]) -> dict[str, Any]:
    """The values that `model.generate(**options)` would use for the keys of `DEFAULTS`."""
    values = dict(DEFAULTS)
    for config in (model.generation_config, options.get("generation_config")):
        if config is not None:
            values |= {name: value for name in DEFAULTS if (value := getattr(config, name, None)) is not None}
    return values | {name: options[name] for name in DEFAULTS if name in options}


def warpers(values: dict[str, Any]) -> LogitsProcessorList:
    """The processors that `generate` adds for sampling, in the same order; `values` come from `sampling_options`."""
    found = LogitsProcessorList()
    if values["temperature"] not in (None, 1.0):
        found.append(TemperatureLogitsWarper(float(values["temperature"])))
    if values["top_h"] is not None:
        found.append(logits_process.TopHLogitsWarper(top_h=values["top_h"]))
    if values["top_k"]:
        found.append(TopKLogitsWarper(top_k=values["top_k"]))
    if values["top_p"] is not None and values["top_p"] < 1.0:
        found.append(TopPLogitsWarper(top_p=float(values["top_p"])))
    if values["min_p"] is not None:
        found.append(MinPLogitsWarper(min_p=values["min_p"]))
    if values["typical_p"] is not None and values["typical_p"] < 1.0:
        found.append(TypicalLogitsWarper(mass=values["typical_p"]))
    if values["epsilon_cutoff"]:
        found.append(EpsilonLogitsWarper(epsilon=values["epsilon_cutoff"]))
    if values["eta_cutoff"]:
        found.append(EtaLogitsWarper(epsilon=values["eta_cutoff"]))
    return found


def private_options(model, options: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Options of `generate` that draw from `generator`, if `options` sample; otherwise `options` unchanged.

    Args:
        options: keyword arguments of `generate`, with `num_return_sequences=1` (the caller repeats the inputs).

    Raises:
        ValueError: `options` sample with several beams, which draw inside `generate`.
    """
    values = sampling_options(model, options)
    if not values["do_sample"]:
        return options
    if values["num_beams"] > 1:
        raise ValueError(
            f"num_beams={values['num_beams']} with do_sample=True draws from the global random numbers inside generate; "
            "pass do_sample=False, or one beam."
        )
    processors = [*(options.get("logits_processor") or []), *warpers(values), GumbelNoise(generator)]
    greedy = {name: DEFAULTS[name] for name in DEFAULTS}
    options = {name: value for name, value in options.items() if name not in DEFAULTS}
    return options | greedy | {"logits_processor": processors}


def one_config(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate`; if they hold a `generation_config`, the other generation options are moved into a copy of it.

    Future versions of `generate` refuse generation options beside a configuration.
    """
    config = copy.deepcopy(options.get("generation_config"))
    if config is None:
        return options
    rest = config.update(**{name: value for name, value in options.items() if name != "generation_config"})
    return rest | {"generation_config": config}


def generation_names() -> set[str]:
    """Keyword arguments that `generate` of any model takes."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    return names | {
        "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model",
        "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "assistant_tokenizer",
    }  # fmt: skip
