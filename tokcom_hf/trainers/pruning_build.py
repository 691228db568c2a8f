"""Builds what token pruning trains from the sections of a recipe: heads that fit a base model, and a discriminator."""

from collections.abc import Mapping
from typing import Any

from ..cli import RecipeError
from ..models.configuration_pruning_discriminator import PruningDiscriminatorConfig
from ..models.configuration_pruning_layer_pruner import LayerPrunerConfig
from ..models.configuration_pruning_token_merger import TokenMergerConfig
from ..models.modeling_pruned_vlm import PrunedVLM
from ..models.modeling_pruning_discriminator import PruningDiscriminator
from ..models.pruning_strategies import STRATEGIES
from ..pruning_checkpoint import StateDict, convert_discriminator, convert_merger, convert_pruners
from .pruning import TokenPruningTrainer, TokenPruningTrainingArguments

# Sections of arguments that recipes which train heads share.
PRUNING_SECTIONS = {
    "merger": TokenMergerConfig,
    "pruner": LayerPrunerConfig,
    "discriminator": PruningDiscriminatorConfig,
    "training": TokenPruningTrainingArguments,
}


def build_heads(
    base: Any,
    merger: Mapping[str, Any] | None,
    pruner: Mapping[str, Any] | None,
    parts: Mapping[str, StateDict] | None = None,
) -> PrunedVLM:
    """A `PrunedVLM` around a base model, with heads of fitting sizes.

    Args:
        base: vision-language model.
        merger: fields of `TokenMergerConfig` without the sizes; None for no merger.
        pruner: fields of `LayerPrunerConfig` without the size; None for no pruners.
        parts: weights of "token_merger" and "layer_pruners" (`pruning_checkpoint.read_parts`); a part that is missing gets
            new weights.
    """
    given, probe = parts or {}, PrunedVLM.from_base(base)
    width, features = probe.family.text_config.hidden_size, probe.family.feature_size
    first: Any = None
    second: Any = None
    if merger is not None:
        settings = {**merger, "feature_size": features, "question_size": width}
        state = given.get("token_merger")
        first = TokenMergerConfig(**settings) if state is None else convert_merger(state, **settings)
    if pruner is not None:
        settings = {**pruner, "hidden_size": width}
        state = given.get("layer_pruners")
        second = LayerPrunerConfig(**settings) if state is None else convert_pruners(state, **settings)
    return PrunedVLM.from_base(base, first, second)


def build_discriminator(
    model: PrunedVLM, settings: Mapping[str, Any], state: StateDict | None = None
) -> PruningDiscriminator:
    """A discriminator of the language model's width, with new weights or with the weights `state` of a documented file."""
    config = PruningDiscriminatorConfig(**{**settings, "hidden_size": model.family.text_config.hidden_size})
    return PruningDiscriminator(config) if state is None else convert_discriminator(state, config)


def check_dtype(dtype: str) -> None:
    """Raises RecipeError for a type that a recipe's --dtype does not know."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")


def check_heads(values: Mapping[str, Mapping[str, Any]], strategy: str | None, keep: int | None, dtype: str) -> None:
    """Raises RecipeError or ValueError for settings of the heads that are wrong with any base model."""
    if strategy is not None and strategy not in STRATEGIES:
        raise RecipeError(f"--strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    if (strategy is None and keep is not None) or (strategy is not None and (keep is None or keep < 1)):
        raise RecipeError(f"--strategy and --keep (at least 1 token) belong together, got {strategy!r} and {keep}.")
    check_dtype(dtype)
    for name in ("merger", "pruner", "discriminator"):
        PRUNING_SECTIONS[name](**values[name])


def check_merge_budget(merger: Mapping[str, Any], base: Any, collator: Any, rows: Any) -> None:
    """Checks that `merge_ratio` and `target_merge_tokens`, if both are set, mean the same number of tokens.

    Args:
        merger: fields of `TokenMergerConfig`.
        base: vision-language model.
        collator: makes batches of rows.
        rows: the vision tokens of the first row are counted.

    Raises:
        RecipeError: the two numbers differ by more than one token.
    """
    if merger.get("merge_ratio") is not None and merger.get("target_merge_tokens") is not None:
        row = collator([rows[0]])
        check_merge_numbers(merger, int((row["input_ids"] == base.config.image_token_id).sum()))


def check_merge_numbers(merger: Mapping[str, Any], tokens: int) -> None:
    """As `check_merge_budget`, for an image that is known to have `tokens` vision tokens."""
    ratio, target = merger.get("merge_ratio"), merger.get("target_merge_tokens")
    if ratio is not None and target is not None and abs(ratio * tokens - target) > 1:
        raise RecipeError(
            f"merge_ratio {ratio} keeps {round(ratio * tokens)} of an image's {tokens} vision tokens, but "
            f"target_merge_tokens is {target}; give one of them (--target_merge_tokens none drops the configuration's)."
        )


def train_heads(
    model: PrunedVLM,
    arguments: Mapping[str, Any],
    rows: Any,
    collator: Any,
    discriminator: Mapping[str, Any] | None = None,
) -> PrunedVLM:
    """Trains a model's heads without checkpoints or evaluations and merges LoRA; for comparisons of settings.

    Args:
        model: the model, which is trained in place.
        arguments: fields of `TokenPruningTrainingArguments`.
        rows: training rows.
        collator: makes batches of rows.
        discriminator: fields of `PruningDiscriminatorConfig`, read if `adversarial_weight` is above 0.

    Returns:
        The same model, in evaluation mode.
    """
    quiet = {"remove_unused_columns": False, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}
    args = TokenPruningTrainingArguments(**{**arguments, **quiet})
    adversary = build_discriminator(model, discriminator or {}) if args.adversarial_weight > 0 else None
    trainer = TokenPruningTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, discriminator=adversary
    )
    trainer.train()
    if args.lora_r:
        trainer.merge_lora()
    return model.eval()
