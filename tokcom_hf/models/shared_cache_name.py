"""The name of the KV cache in transformers: `past_key_values` up to 5.23, `cache` from 5.24 on."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import create_causal_mask


def cache_argument(function: Callable) -> str:
    """The name under which `function` takes a KV cache: `cache` where its signature has it, else `past_key_values`."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache under either name, or None.

    Raises:
        ValueError: both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them.")
    return past_key_values if cache is None else cache


# The name in this version of transformers.
CACHE = cache_argument(create_causal_mask)
