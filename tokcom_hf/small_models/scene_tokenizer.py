"""Word-level tokenizer of the procedural scenes' questions, answers and captions."""

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ..data.scenes import _DETAIL_COLOURS, COLOURS, MAX_COUNT, SHAPES, SIZES

_FUNCTION_WORDS = (
    "how many are there what colour is the shape of dot object objects left right leftmost rightmost topmost "
    "bottommost ? , . a an and with at top middle bottom in to image"
)


def scene_words() -> list[str]:
    """Returns all words of scene questions, answers and captions."""
    words = [*_FUNCTION_WORDS.split(), *COLOURS, *_DETAIL_COLOURS, *SHAPES, *SIZES]
    words += [f"{shape}s" if shape != "cross" else "crosses" for shape in SHAPES]
    words += [str(n) for n in range(MAX_COUNT + 7)]
    return list(dict.fromkeys(words))


def text_fields(tokenizer) -> dict[str, Any]:
    """Returns the fields of a language model's config that follow from its tokenizer: vocabulary size and special tokens."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def end_generation_like(model, tokenizer) -> None:
    """Makes `model.generate` stop at the tokenizer's EOS token and pad with its padding token."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def scene_tokenizer(image_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer of `scene_words()`.

    Args:
        image_tokens: attribute name -> special token of the model's processor.
    """
    special = ["<pad>", "</s>", "<unk>", *image_tokens.values()]
    vocabulary = {word: index for index, word in enumerate([*special, *scene_words()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=image_tokens,
    )
