"""Documented functions: `expand_vocab_for_lfq` adds LFQ tokens to a model, `get_lfq_token_range` returns their ids."""

from .models.lfq_rows import vocabulary_of
from .models.lfq_tokens import check_output_dim
from .models.modeling_lfq_expanded import LFQExpandedModel


def _output_dim(lfq_config: dict | None) -> int:
    config = {"output_dim": 16} if lfq_config is None else lfq_config
    if "output_dim" not in config:
        raise ValueError(f"lfq_config needs the key 'output_dim', the number of bits per code; got {sorted(config)}.")
    return check_output_dim(config["output_dim"])


def expand_vocab_for_lfq(
    model,
    lfq_config: dict | None = None,
    embedding_init_method: str = "random",
    embedding_init_std: float = 0.02,
    freeze_original: bool = True,
    tokenizer=None,
) -> LFQExpandedModel:
    """Appends 2^output_dim tokens to the vocabulary of a model; existing ids and embedding rows do not change.

    Args:
        model: a loaded model, or its Hub name or folder.
        lfq_config: `{"output_dim": bits per code}`; None means 16 bits.
        embedding_init_method, embedding_init_std, freeze_original, tokenizer: see `LFQExpandedModel.from_base`.

    Raises:
        ValueError: `lfq_config` lacks `output_dim`, or `LFQExpandedModel.from_base` refuses an argument.
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
    """Returns the range `(start, end)` of a model's LFQ ids, end exclusive.

    Args:
        model: an expanded model, a joint model that contains one, or the result of `merge_and_unload()`. For a plain model,
            the range is the one that `expand_vocab_for_lfq` would add.
        lfq_config: `{"output_dim": bits per code}`. For a plain model, None means 16 bits. For an expanded model, None skips
            the check of the number of bits.

    Raises:
        ValueError: the model's LFQ tokens have another number of bits than `lfq_config`.
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
