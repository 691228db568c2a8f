"""Which keywords the base model of an `LFQExpandedModel` takes, so that a misspelt one is named and none is swallowed."""

import inspect

from transformers.utils import TransformersKwargs

from .lfq_rows import text_host
from .shared_cache_name import cache_argument


def keywords_of(base) -> frozenset[str]:
    """Names that act in a base model's forward, `labels` aside.

    Where it takes `**kwargs`, it hands them to its language model and to attention: what these name acts, too.
    """
    parameters = _parameters(base)
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= set(_parameters(text_host(base))) | set(TransformersKwargs.__annotations__)
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
        if decoder is not None:
            names |= set(_parameters(decoder))
    return frozenset(names - {"labels", "kwargs", "num_items_in_batch", "return_dict", "args"})


def cache_keyword_of(base) -> str:
    """The name under which a base model's forward takes a KV cache."""
    return cache_argument(
        base.forward if {"cache", "past_key_values"} & set(_parameters(base)) else text_host(base).forward
    )


def _parameters(module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)
