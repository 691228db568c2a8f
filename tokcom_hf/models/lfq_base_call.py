"""The keywords of an `LFQExpandedModel`'s base model. A misspelt keyword raises; `**kwargs` alone would ignore it."""

import inspect
from typing import Any

from transformers.utils import TransformersKwargs

from .lfq_rows import text_host
from .shared_cache_name import cache_argument

# Arguments of `LFQExpandedModel.forward` that go to the base model unchanged, in the order in which `named` takes them.
PASSED = (
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids",
    "pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "pixel_values_videos", "video_grid_thw",
    "second_per_grid_ts", "use_cache", "logits_to_keep",
)  # fmt: skip


def named(*values: Any) -> dict[str, Any]:
    """Names the values of the arguments `PASSED`, given in their order."""
    return dict(zip(PASSED, values, strict=True))


def keywords_of(base) -> frozenset[str]:
    """Names of the keywords that act in a base model's forward, without `labels`.

    A forward with `**kwargs` hands these to its language model and to attention, whose keywords therefore act, too.
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


def checked_keywords(model, inputs: dict) -> dict:
    """The keywords with which the base model is called: `inputs` without those that are None.

    Args:
        model: the `LFQExpandedModel`.
        inputs: values by keyword.

    Raises:
        TypeError: a keyword that the base model does not take.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name in inputs:
        if name not in model.keywords:
            raise TypeError(f"The forward of {type(model.base).__name__} takes no argument {name!r}.")
    if model.base.config.return_dict is False:
        inputs["return_dict"] = True
    return inputs


def check_attentions(base, output) -> None:
    """Raises ValueError where attentions were asked for and the attention implementation gave none."""
    if any(layer is None for layer in output.attentions or (None,)):
        raise ValueError(
            f"attn_implementation={base.config.get_text_config()._attn_implementation!r} gives no attentions; "
            "load the model with attn_implementation='eager'."
        )


def _parameters(module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)
