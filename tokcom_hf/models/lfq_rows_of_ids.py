"""Truncates and pads rows of ids with LFQ tokens for `LFQProcessor`, as transformers' tokenizers do."""

import inspect
from dataclasses import dataclass

# Keywords of tokenizers without a defined meaning for rows with LFQ tokens.
REFUSED = (
    "text_pair", "text_target", "text_pair_target", "stride", "is_split_into_words", "return_overflowing_tokens",
    "return_offsets_mapping", "return_special_tokens_mask", "return_length", "return_token_type_ids",
)  # fmt: skip
# A `model_max_length` from here on means that the tokenizer has no limit.
LARGE = 10**20


@dataclass(frozen=True)
class RowLengths:
    """How rows are cut and padded.

    Attributes:
        cut: largest number of ids in a row; None for no limit.
        pad: `longest`, a number of ids, or None for no padding.
        multiple: padded lengths are multiples of this number.
        pad_left, cut_left: whether padding is added, and ids are cut, on the left.
        fill: id of padding.
    """

    cut: int | None
    pad: int | str | None
    multiple: int
    pad_left: bool
    cut_left: bool
    fill: int | None


def row_lengths(tokenizer, padding, truncation, max_length, pad_to_multiple_of, padding_side) -> RowLengths:
    """The options of a tokenizer call, checked.

    Raises:
        ValueError: an unknown option, or neither the call nor the tokenizer gives a limit that is needed.
    """
    padding, truncation = getattr(padding, "value", padding), getattr(truncation, "value", truncation)
    paddings = {False: None, None: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": 0}
    if padding not in paddings:
        raise ValueError(f"padding must be True, False, longest, max_length or do_not_pad, got {padding!r}.")
    cuts = {False: False, None: False, "do_not_truncate": False, True: True, "longest_first": True, "only_first": True}
    if truncation not in cuts:
        raise ValueError(
            f"truncation must be True, False, longest_first, only_first or do_not_truncate, got {truncation!r}."
        )
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"padding_side must be left or right, got {padding_side!r}.")
    pad = paddings[padding]
    if max_length is None and tokenizer.model_max_length < LARGE:
        limit: int | None = tokenizer.model_max_length
    else:
        limit = max_length
    if (pad == 0 or cuts[truncation]) and limit is None:
        raise ValueError("padding='max_length' and truncation need max_length: this tokenizer knows no limit.")
    if max_length is not None and pad != 0 and not cuts[truncation]:
        raise ValueError("max_length acts with truncation=True or padding='max_length' only; pass one of them.")
    return RowLengths(
        cut=limit if cuts[truncation] else None,
        pad=limit if pad == 0 else pad,
        multiple=pad_to_multiple_of or 1,
        pad_left=(padding_side or tokenizer.padding_side) == "left",
        cut_left=tokenizer.truncation_side == "left",
        fill=tokenizer.pad_token_id,
    )


def finish_rows(batch: dict, around: tuple[list, list], lengths: RowLengths, image_token, has_images: bool) -> dict:
    """Rows cut to length, with the special tokens around them and padding.

    Args:
        batch: `input_ids` and all other values with one number per id, each as a list of rows.
        around: special ids before and after each row, which are never cut.
        lengths: how rows are cut and padded.
        image_token: id of the base model's image placeholder, or None.
        has_images: whether the rows have image placeholders, which must not be cut.

    Raises:
        ValueError: a cut that would remove image tokens, or no padding token where one is needed.
    """
    room = None if lengths.cut is None else max(lengths.cut - len(around[0]) - len(around[1]), 0)
    finished: dict[str, list[list[int]]] = {}
    for name, rows in batch.items():
        ends = around if name == "input_ids" else ([0] * len(around[0]), [0] * len(around[1]))
        finished[name] = [[*ends[0], *_cut(row, room, lengths.cut_left), *ends[1]] for row in rows]
    for before, after in zip(batch["input_ids"], finished["input_ids"], strict=True):
        lost = has_images and room is not None and len(before) > room
        if lost and (image_token is None or before.count(image_token) != after.count(image_token)):
            raise ValueError(
                f"Truncation to {lengths.cut} would cut the tokens of an image; raise max_length or shorten the text."
            )
    finished["attention_mask"] = [[1] * len(row) for row in finished["input_ids"]]
    return finished if lengths.pad is None else _pad(finished, lengths)


def _cut(row: list[int], room: int | None, left: bool) -> list[int]:
    if room is None or len(row) <= room:
        return row
    return row[len(row) - room :] if left else row[:room]


def _pad(batch: dict, lengths: RowLengths) -> dict:
    longest = max(map(len, batch["input_ids"]), default=0)
    width = longest if lengths.pad == "longest" else lengths.pad
    width = -(-width // lengths.multiple) * lengths.multiple
    if lengths.fill is None and any(len(row) < width for row in batch["input_ids"]):
        raise ValueError("The tokenizer has no pad token; set processor.tokenizer.pad_token first.")
    padded = {}
    for name, rows in batch.items():
        pads = [[lengths.fill if name == "input_ids" else 0] * (width - len(row)) for row in rows]
        padded[name] = [pad + row if lengths.pad_left else row + pad for pad, row in zip(pads, rows, strict=True)]
    return padded


def known_options(processor) -> set[str] | None:
    """Keywords that a base model's processor takes beside text and images; None where it does not declare them."""
    parameters = inspect.signature(processor.__call__).parameters
    known = {name for name, kind in parameters.items() if kind.kind is not kind.VAR_KEYWORD}
    if len(known) == len(parameters):
        return known
    groups = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", None)
    if groups is None:
        return None
    for name, group in groups.items():
        known |= {name} | set(getattr(group, "__annotations__", ()))
    for part in ("image_processor", "video_processor", "feature_extractor"):
        valid = getattr(getattr(processor, part, None), "valid_kwargs", None)
        known |= set(getattr(valid, "__annotations__", ()))
    return known
