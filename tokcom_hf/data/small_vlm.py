"""The processor of the small LLaVA that `recipes/pretrain_vlm.py` trains: CLIP images and a word-level tokenizer."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from .scenes import _DETAIL_COLOURS, COLOURS, MAX_COUNT, SHAPES, SIZES

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


def scene_processor(image_size: int, patch_size: int) -> LlavaProcessor:
    """A `LlavaProcessor` for square images of `image_size` pixels, `(image_size / patch_size)²` tokens per image."""
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *scene_words()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
