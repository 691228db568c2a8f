"""The documented functions: `expand_vocab_for_lfq` adds LFQ tokens to a model, `get_lfq_token_range` gives their ids."""

from .models.lfq_rows import vocabulary_of
from .models.lfq_tokens import check_output_dim
from .models.modeling_lfq_expanded import LFQExpandedModel


def _output_dim(lfq_config: dict | None) -> int:
    config = {"output_dim": 16} if lfq_config is None else lfq_config
    if "output_dim" not in config:
        raise ValueError(f"lfq_config needs the key 'output_dim', the bits per code; got {sorted(config)}.")
    return check_output_dim(config["output_dim"])


def expand_vocab_for_lfq(
    model,
    lfq_config: dict | None = None,
    embedding_init_method: str = "random",
    embedding_init_std: float = 0.02,
    freeze_original: bool = True,
    tokenizer=None,
) -> LFQExpandedModel:
    """Adds 2^output_dim tokens behind the vocabulary of a model, whose own ids and rows do not change.

    Args:
        model: a loaded model, or its Hub name or folder.
        lfq_config: `{"output_dim": bits per code}`, 16 bits where None.
        embedding_init_method, embedding_init_std, freeze_original, tokenizer: see `LFQExpandedModel.from_base`.
    """
    return LFQExpandedModel.from_base(
        model,
        output_dim=_output_dim(lfq_config),
        embedding_init_method=embedding_init_method,
        embedding_init_std=embedding_init_std,
        freeze_original=freeze_original,
        tokenizer=tokenizer,
    )


def get_lfq_token_range(model, lfq_config: dict | None = None) -> tuple[int, int]:
    """`(start, end)` of a model's LFQ ids, end exclusive.

    Args:
        model: an expanded model, a joint model around one, the result of `merge_and_unload()`; or a plain model, for the
            range that it would get.
        lfq_config: `{"output_dim": bits per code}`. A plain model is taken to get so many, 16 where None; another must have
            so many.

    Raises:
        ValueError: the model has LFQ tokens of another number of bits.
    """
    inner = getattr(model, "language_model", None)
    model = inner if isinstance(inner, LFQExpandedModel) else model
    if isinstance(model, LFQExpandedModel):
        found: int | None = model.config.output_dim
        start = model.config.lfq_start_token_id
    else:
        text = model.config.get_text_config()
        found = getattr(text, "lfq_output_dim", None)
        start = len(vocabulary_of(model)[0].weight) if found is None else text.lfq_start_token_id
    if found is None:
        found = _output_dim(lfq_config)
    elif lfq_config is not None and _output_dim(lfq_config) != found:
        raise ValueError(f"This model's LFQ tokens have {found} bits, but lfq_config says {_output_dim(lfq_config)}.")
    return start, start + 2**found
