"""Checks of `PrunedVLM`: do the stages fit the base model, and can every argument act?"""

import inspect

from transformers import GenerationConfig, GenerationMixin

from .pruning_strategies import LAYER_STRATEGIES, STRATEGIES
from .shared_tensor_checks import check_ids
from .shared_wrapped_base import check_generation_config


def check_stages(model) -> None:
    """Checks that the stages fit the base model.

    Raises:
        ValueError: the language model lacks a layer, the strategy is unknown, widths differ, or a budget exceeds the number
            of tokens that arrive.
    """
    depth = len(model.family.text_model.layers)
    layers = model.layer_pruner.config.layers if model.layer_pruner is not None else []
    if model.config.strategy in LAYER_STRATEGIES:
        layers = [model.config.strategy_layer]
        if layers[0] < 1:
            raise ValueError(
                "fastv reads the attention of the layer before strategy_layer, which must be >= 1, got "
                f"{model.config.strategy_layer}."
            )
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(
            f"Pruning layers {layers} must lie in 0 … {depth - 1}: the language model has {depth} layers."
        )
    known = (*STRATEGIES, *LAYER_STRATEGIES)
    if model.config.strategy is not None and model.config.strategy not in known:
        raise ValueError(f"Unknown strategy {model.config.strategy!r}; known are {', '.join(known)}.")
    width, size = model.family.text_config.hidden_size, model.family.feature_size
    if model.layer_pruner is not None and model.layer_pruner.config.hidden_size != width:
        raise ValueError(
            f"layer_pruner.hidden_size must be the language model's {width}, got {model.layer_pruner.config.hidden_size}."
        )
    merger = model.token_merger.config if model.token_merger is not None else None
    _check_budget(model, merger)
    if merger is None:
        return
    if merger.attention_guided in (True, "tower") and not model.family.gives_attention:
        family = model.base.config.model_type
        raise ValueError(
            f"attention_guided={merger.attention_guided!r} reads the vision tower's attention, which {family!r} does not "
            "give; set attention_guided to 'question', the question's attention to the image, which every VLM gives."
        )
    reads_question = hasattr(model.token_merger, "question_proj")
    if merger.feature_size != size or (reads_question and merger.question_size != width):
        raise ValueError(
            f"token_merger needs feature_size={size} and question_size={width} for this VLM, got "
            f"{merger.feature_size} and {merger.question_size}."
        )


def _check_budget(model, merger) -> None:
    """Refuses a stage that wants more tokens than the stage before it leaves.

    If images may have many sizes, the numbers are not known here; a stage then keeps all tokens of a smaller image.
    """
    budget = model.layer_pruner.config.keep_tokens if model.layer_pruner is not None else None
    left = model.family.tokens_per_image
    for name, wanted in (("keep", model.config.keep), ("target_merge_tokens", merger and merger.target_merge_tokens)):
        if wanted and left and wanted > left:
            raise ValueError(f"{name}={wanted} is more than the image's {left} vision tokens; lower it.")
    if merger is not None and merger.max_ratio is not None:
        left = left and merger.tokens_kept(left)
    elif merger is not None:
        left = merger.target_merge_tokens or (left and merger.merge_ratio * left)
    if budget and left and max(budget) > left:
        raise ValueError(
            f"layer_pruner.keep_tokens={budget} wants more than the {left:g} vision tokens that reach the language "
            "model; lower it, or raise token_merger.target_merge_tokens or merge_ratio."
        )


def check_call(config, input_ids, output_attentions: bool | None) -> None:
    """Raises ValueError for a forward pass that asks for attentions or lacks `input_ids`, and the errors of `check_ids`."""
    _refuse_attentions(config.output_attentions if output_attentions is None else output_attentions)
    if input_ids is None:
        raise ValueError("PrunedVLM needs input_ids: it finds the images by their placeholders.")
    check_ids(input_ids)


def _refuse_attentions(wanted: bool | None) -> None:
    if wanted:
        raise ValueError(
            "PrunedVLM returns no attentions: its layers hold different tokens, so the weights would not line up. "
            "Leave output_attentions out; kept_index tells which tokens every layer saw."
        )


def check_cached_turn(cache, images: dict, pruning_mode: str | None, use_cache: bool | None) -> None:
    """Raises ValueError for arguments that cannot act on new tokens behind a cached prompt."""
    if images:
        raise ValueError(
            f"{', '.join(images)} came with a filled cache, but a cached turn takes text only: give the whole "
            "conversation with all of its images as a new prompt."
        )
    if pruning_mode is not None and pruning_mode != cache.mode:
        raise ValueError(
            f"pruning_mode={pruning_mode!r}, but the cache holds a prompt pruned in mode {cache.mode!r}; start a new one."
        )
    if use_cache is False:
        raise ValueError("use_cache=False and a filled cache contradict each other.")


def check_generation(model, input_ids, generation_config: GenerationConfig | None, options: dict) -> None:
    """Raises ValueError for options of `generate` that could not act."""
    if input_ids is None:
        raise ValueError("generate needs input_ids; call it with the processor's output.")
    check_ids(input_ids)
    check_generation_config(generation_config)
    settings = generation_config or model.generation_config
    wanted = lambda name: options[name] if name in options else getattr(settings, name, None)  # noqa: E731
    if wanted("use_cache") is False:
        raise ValueError("PrunedVLM generates with a KV cache only; leave use_cache out.")
    if wanted("cache_implementation") is not None:
        raise ValueError("PrunedVLM brings its own cache; leave cache_implementation out.")
    _refuse_attentions(wanted("output_attentions") or model.config.output_attentions)
    if options.get("cache") is not None or options.get("past_key_values") is not None:
        raise ValueError(
            "generate starts a new prompt and takes no cache: give the whole conversation, or call forward with the "
            "cache and the new tokens."
        )
    if any("video" in name for name in options):
        raise ValueError("PrunedVLM takes images only (videos are not supported).")
    taken = inspect.signature(GenerationMixin.generate).parameters.keys() | vars(GenerationConfig()).keys()
    # transformers' own loop refuses names that neither the loop nor `forward` knows.
    inputs = inspect.signature(type(model).forward).parameters.keys() | {"inputs_embeds"}
    refused = sorted(options.keys() & inputs - taken)
    if refused:
        raise ValueError(f"generate does not take {', '.join(refused)}; leave it out.")
