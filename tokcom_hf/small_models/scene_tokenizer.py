"""Word-level tokenizer of the procedural scenes' questions, answers and captions."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ..data.scenes import _DETAIL_COLOURS, COLOURS, MAX_COUNT, SHAPES, SIZES

_FUNCTION_WORDS = (
    "how many are there what colour is the shape of dot object objects left right leftmost rightmost topmost "
    "bottommost ? , . a an and with at top middle bottom in to image"
)


def scene_words() -> list[str]:
    """Every word that scene questions, answers and captions use."""
    words = [*_FUNCTION_WORDS.split(), *COLOURS, *_DETAIL_COLOURS, *SHAPES, *SIZES]
    words += [f"{shape}s" if shape != "cross" else "crosses" for shape in SHAPES]
    words += [str(n) for n in range(MAX_COUNT + 7)]
    return list(dict.fromkeys(words))


def scene_tokenizer(image_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of those words. `image_tokens`: attribute → special token, what the model's processor asks for."""
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
