"""`LFQProcessor`: text, images and LFQ tokens of an `LFQExpandedModel`, with nothing added to its tokenizer.

An LFQ token is written as the marker `<lfq:12345>`, where 12345 is its id minus the first LFQ id. Markers are parsed as
numbers and the text between them goes through the tokenizer: a tokenizer with 65,536 added strings would be very slow.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from .lfq_rows_of_ids import REFUSED, finish_rows, known_options, row_lengths
from .lfq_text_pieces import anchor_of, decode_behind, eats_spaces, encode_piece
from .lfq_tokens import check_output_dim, decode_tokens_to_lfq_codes
from .shared_tokenizer_size import tokenizer_size

MARKER = re.compile(r"<lfq:(\d+)>")
BASE_FOLDER = "base_processor"
# Keywords of `apply_chat_template` that act on ids.
ROW_OPTIONS = (
    "images", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask",
    "return_tensors",
)  # fmt: skip


class LFQProcessor(ProcessorMixin):
    """Tokenizer (and image processor) of a base model, extended by LFQ tokens.

    Args:
        tokenizer: the base model's tokenizer.
        lfq_start_token_id: first LFQ id, `model.config.lfq_start_token_id`; larger than `len(tokenizer)` where the
            vocabulary is padded.
        output_dim: bits per code.
        base: the base model's processor, where it takes images.
        image_prompt: text before an image's tokens, with `{caption}` in it. With an empty caption it is the unconditional
            prompt of classifier-free guidance.
        has_base: whether the saved folder holds `base`; written by `save_pretrained`.

    processor = LFQProcessor.from_model(expanded, base_tokenizer_or_processor)
    batch = processor(text="a red circle <lfq:17><lfq:4>", return_tensors="pt")
    processor.batch_decode(ids)                 # text with <lfq:...> where LFQ ids are
    processor.split_images(ids[0])              # runs of LFQ ids
    """

    def __init__(
        self,
        tokenizer=None,
        lfq_start_token_id: int = 0,
        output_dim: int = 16,
        base=None,
        image_prompt: str = "{caption}",
        has_base: bool = False,
        chat_template=None,
    ):
        check_output_dim(output_dim)
        size = 0 if tokenizer is None else tokenizer_size(tokenizer)
        if size > lfq_start_token_id:
            raise ValueError(
                f"The tokenizer has ids up to {size - 1}, but LFQ ids start at {lfq_start_token_id}: they would "
                "mean two things. lfq_start_token_id is the number of embedding rows of the base model."
            )
        if "{caption}" not in image_prompt:
            raise ValueError(f"image_prompt must contain {{caption}}, got {image_prompt!r}.")
        self.lfq_start_token_id, self.output_dim, self.image_prompt = lfq_start_token_id, output_dim, image_prompt
        super().__init__(tokenizer, chat_template=chat_template or getattr(base or tokenizer, "chat_template", None))
        self._text_size = size
        self._spaces: bool | None = None
        # `to_dict` leaves `base` out, because two processors cannot share one processor_config.json.
        self.base = base
        self.has_base = has_base or base is not None

    @classmethod
    def from_model(cls, model, base, image_prompt: str = "{caption}") -> "LFQProcessor":
        """The processor of an `LFQExpandedModel`; `base` is its base model's tokenizer or processor."""
        tokenizer = getattr(base, "tokenizer", base)
        start, output_dim = model.config.lfq_start_token_id, model.config.output_dim
        return cls(tokenizer, start, output_dim, base=None if tokenizer is base else base, image_prompt=image_prompt)

    # ------------------------------------------------------------------ text to ids
    def __call__(
        self,
        text=None,
        images=None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **kwargs,
    ):
        """One batch of texts with `<lfq:N>` markers, and of images where the base model takes them.

        Args:
            text: string or list of strings.
            images: images in the form that the base model's processor takes, in the order of their placeholders.
            padding, truncation, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors,
                add_special_tokens: as in transformers, for rows with their LFQ tokens.
            kwargs: keywords of the base model's processor, where there is one.

        Returns:
            `input_ids`, `attention_mask` and everything else that the base model's processor returns.

        Raises:
            TypeError: a keyword is unknown, or a text is no string.
            ValueError: a marker is beyond the 2^output_dim codes, the base model takes no images, there is no text, or a
                length would cut an image's tokens.
        """
        if text is None:
            raise ValueError("LFQProcessor needs text; for images alone call its `base` processor.")
        rows = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
        if not all(isinstance(row, str) for row in rows):
            raise TypeError(f"text must be a string or a list of strings, got {text!r:.60}.")
        if images is not None and self.base is None:
            raise ValueError("This LFQProcessor has a tokenizer only: the base model sees no images.")
        self._check_options(kwargs)
        lengths = row_lengths(self.tokenizer, padding, truncation, max_length, pad_to_multiple_of, padding_side)
        encoded, batch = self._encode([self._split(row) for row in rows], images, kwargs)
        around = self._special_ids() if add_special_tokens else ([], [])
        rest = {name: encoded[name] for name in encoded if name not in batch and name != "attention_mask"}
        image_token = getattr(self.base, "image_token_id", None) if rest else None
        finished = finish_rows(batch, around, lengths, image_token, has_images=bool(rest))
        if not return_attention_mask:
            del finished["attention_mask"]
        if return_tensors is not None and len(set(map(len, finished["input_ids"]))) > 1:
            raise ValueError("Texts of different length make no tensor; pass padding=True.")
        return BatchFeature(finished | rest, tensor_type=return_tensors)

    def _encode(self, parts: list[list[str | int]], images, options: dict):
        """Encodes the pieces of all rows in one call, and joins all values with one number per token to rows.

        Args:
            parts: for each row, its texts and code numbers in order.
            images: images for the base model's processor.
            options: keywords of the base model's processor.

        Returns:
            The processor's output for the pieces; and, by name, the joined rows of `input_ids` and of other values per token
            (mm_token_type_ids), which are 0 at LFQ tokens.
        """
        texts, anchor_lengths = [], []
        for row in parts:
            for index, part in enumerate(row):
                if isinstance(part, str):
                    anchor = anchor_of(self.tokenizer, part) if index > 0 and self._eats_spaces() else ""
                    texts.append(anchor + part)
                    anchor_lengths.append(len(encode_piece(self.tokenizer, anchor)) if anchor else 0)
        inputs = options | ({} if images is None else {"images": images})
        encoder = self.tokenizer if self.base is None else self.base
        encoded = encoder(text=texts, add_special_tokens=False, **inputs) if texts else {"input_ids": []}
        lengths = [len(ids) for ids in encoded["input_ids"]]
        aligned = [name for name in encoded if name != "attention_mask" and _lengths(encoded[name]) == lengths]
        batch: dict[str, list[list[int]]] = {name: [] for name in aligned}
        for name in aligned:
            pieces = iter(zip(encoded[name], anchor_lengths, strict=True))
            for row in parts:
                values: list[int] = []
                for part in row:
                    if isinstance(part, str):
                        piece, anchor_length = next(pieces)
                        values += list(map(int, piece[anchor_length:]))
                    else:
                        values.append(self.lfq_start_token_id + part if name == "input_ids" else 0)
                batch[name].append(values)
        return encoded, batch

    def _check_options(self, options: dict) -> None:
        """Raises TypeError for a keyword that the base model's processor does not take; a tokenizer alone takes none."""
        known: set[str] | None = set()
        if self.base is not None:
            known = known_options(self.base)
        for name in options:
            if name in REFUSED or (known is not None and name not in known):
                raise TypeError(f"LFQProcessor got an unexpected keyword argument {name!r}.")

    def _eats_spaces(self) -> bool:
        if self._spaces is None:
            self._spaces = eats_spaces(self.tokenizer)
        return self._spaces

    def _split(self, text: str) -> list[str | int]:
        """The texts (none of them empty) and code numbers of a text with markers, in order."""
        parts: list[str | int] = []
        for index, part in enumerate(MARKER.split(text)):
            if index % 2 == 0:
                parts += [part] if part else []
            elif int(part) >= 2**self.output_dim:
                raise ValueError(f"<lfq:{part}> does not exist: codes are 0 … {2**self.output_dim - 1}.")
            else:
                parts.append(int(part))
        return parts

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Special ids that the tokenizer puts before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    # ------------------------------------------------------------------ ids to text and codes
    @property
    def lfq_token_range(self) -> tuple[int, int]:
        """`(start, end)` of the LFQ ids, end exclusive."""
        return self.lfq_start_token_id, self.lfq_start_token_id + 2**self.output_dim

    def decode(self, token_ids, skip_lfq_tokens: bool = False, **kwargs) -> str:
        """Text of one row of ids, LFQ ids written `<lfq:N>` or left out."""
        text: list[str] = []
        for number, (is_lfq, run) in enumerate(self._runs(token_ids)):
            if not is_lfq:
                inside = number > 0 and self._eats_spaces()
                text.append(
                    decode_behind(self.tokenizer, run, **kwargs) if inside else self.tokenizer.decode(run, **kwargs)
                )
            elif not skip_lfq_tokens:
                text.append("".join(f"<lfq:{token - self.lfq_start_token_id}>" for token in run))
        return "".join(text)

    def batch_decode(self, sequences, skip_lfq_tokens: bool = False, **kwargs) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_lfq_tokens, **kwargs) for row in sequences]

    def split_images(self, token_ids, num_image_tokens: int | None = None) -> list[torch.Tensor]:
        """Runs of LFQ ids in one row, each int64 `(n,)`; with `num_image_tokens` cut into whole images of that length."""
        runs = [torch.tensor(run) for is_lfq, run in self._runs(token_ids) if is_lfq]
        if num_image_tokens is None:
            return runs
        parts = [part for run in runs for part in run.split(num_image_tokens)]
        return [part for part in parts if len(part) == num_image_tokens]

    def codes(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Bits `(..., output_dim)` of LFQ ids; see `decode_tokens_to_lfq_codes`."""
        return decode_tokens_to_lfq_codes(token_ids, self.lfq_start_token_id, self.output_dim)

    def render(self, codes: torch.Tensor) -> str:
        """Markers of code numbers `(n,)` or `(h, w)`, which `VQGAN.encode` returns."""
        return "".join(f"<lfq:{code}>" for code in codes.flatten().tolist())

    def _runs(self, token_ids) -> list[tuple[bool, list[int]]]:
        start, end = self.lfq_token_range
        runs: list[tuple[bool, list[int]]] = []
        for token in token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids):
            inside = start <= token < end
            if self._text_size <= token and not inside:
                # Ids of padding rows of the vocabulary table have no text.
                continue
            if not runs or runs[-1][0] != inside:
                runs.append((inside, []))
            runs[-1][1].append(token)
        return runs

    def apply_chat_template(self, conversation, tokenize: bool = False, **kwargs):  # type: ignore[override]  # as called
        """A chat as text by the base model's template; with `tokenize=True` as a batch, markers read as in a call."""
        owner = self.tokenizer if self.base is None else self.base
        options = {name: value for name, value in kwargs.items() if name in ROW_OPTIONS}
        template = {name: value for name, value in kwargs.items() if name not in ROW_OPTIONS}
        if options and not tokenize:
            raise ValueError(f"{', '.join(options)} act on ids; pass tokenize=True.")
        text = owner.apply_chat_template(conversation, tokenize=False, **template)
        return self(text=text, add_special_tokens=False, **options) if tokenize else text

    # ------------------------------------------------------------------ files
    def to_dict(self, *args, **kwargs) -> dict:
        values = super().to_dict(*args, **kwargs)
        values.pop("base", None)
        names = ("lfq_start_token_id", "output_dim", "image_prompt", "has_base")
        return values | {name: getattr(self, name) for name in names}

    def save_pretrained(self, save_directory, **kwargs):
        """Saves tokenizer and LFQ settings in `save_directory`, and the base model's processor in a folder inside it."""
        files = super().save_pretrained(save_directory, **kwargs)
        if self.base is not None:
            self.base.save_pretrained(Path(save_directory) / BASE_FOLDER)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads what `save_pretrained` wrote."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.has_base:
            hub = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
            processor.base = AutoProcessor.from_pretrained(pretrained_model_name_or_path, subfolder=BASE_FOLDER, **hub)
        return processor


def _lengths(values) -> list[int] | None:
    return (
        [len(row) for row in values]
        if isinstance(values, list) and all(hasattr(v, "__len__") for v in values)
        else None
    )
