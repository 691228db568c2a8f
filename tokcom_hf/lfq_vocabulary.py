"""Functions to add LFQ tokens to a model and to ask where they are."""

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
    """Adds 2^output_dim tokens behind the rows of a model's vocabulary; ids below keep their meaning and their rows.

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
        model: an expanded model, a joint model around one (its `language_model`), the result of its `merge_and_unload()`,
            or a plain one: then the range it would get.
        lfq_config: `{"output_dim": bits per code}`; needed for a plain model (16 bits where None), checked otherwise.

    Raises:
        ValueError: the model has LFQ tokens of another size.
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
