"""Inputs of InternVL models without torchvision, and a small InternVL for procedural scenes.

transformers' own `InternVLProcessor` needs torchvision for its video half. Joint LFQ training shows one tile per image and
no video, so `TileProcessor` puts a tokenizer and an image processor together by itself. It serves real InternVL
checkpoints in the format of `OpenGVLab/InternVL3-1B-hf` and the small model alike.
"""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from .scene_tokenizer import end_generation_like, scene_tokenizer, text_fields

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}


class TileProcessor:
    """Text and images of an InternVL model, one tile per image.

    Args:
        tokenizer: with the attributes of `IMAGE_TOKENS`, as InternVL's tokenizers have them.
        image_processor: called with `crop_to_patches=False`.
        image_seq_length: vision tokens per tile.
    """

    def __init__(self, tokenizer, image_processor, image_seq_length: int):
        missing = [name for name in IMAGE_TOKENS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}; TileProcessor serves InternVL checkpoints in transformers' "
                "own format, such as OpenGVLab/InternVL3-1B-hf."
            )
        self.tokenizer, self.image_processor, self.image_seq_length = tokenizer, image_processor, image_seq_length
        self.image_token = tokenizer.context_image_token
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "TileProcessor":
        """Tokenizer, image processor and tokens per tile of a checkpoint (folder or Hub id)."""
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, InternVLConfig):
            raise ValueError(
                f"{str(name)!r} is a {config.model_type!r} model; joint LFQ training needs an InternVL one, in the "
                "format of OpenGVLab/InternVL3-1B-hf."
            )
        tokenizer, image_processor = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        return cls(tokenizer, image_processor, config.image_seq_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer and image processor."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def __call__(self, text, images=None, return_tensors: str = "pt", padding: bool = True) -> dict[str, Any]:
        """Texts, in which each `image_token` stands for the next image, and images → model inputs."""
        tile = self.start_image_token + self.image_token * self.image_seq_length + self.end_image_token
        texts = [one.replace(self.image_token, tile) for one in text]
        encoded = self.tokenizer(texts, return_tensors=return_tensors, padding=padding)
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if images is not None:
            pictures = [image.convert("RGB") for image in images]
            made = self.image_processor(pictures, return_tensors=return_tensors, crop_to_patches=False)
            inputs["pixel_values"] = made["pixel_values"]
        return inputs


def scene_tile_processor(image_size: int, image_seq_length: int) -> TileProcessor:
    """The procedural scenes' tokenizer and an image processor for squares of `image_size` pixels."""
    tokenizer = scene_tokenizer(IMAGE_TOKENS)
    size = {"height": image_size, "width": image_size}
    return TileProcessor(tokenizer, GotOcr2ImageProcessorPil(size=size, crop_to_patches=False), image_seq_length)


def tokens_per_tile(vision: InternVLVisionConfig, downsample_ratio: float = 0.5) -> int:
    """Vision tokens that reach the language model: patches times downsample_ratio²."""
    size: Any = vision.image_size
    patch: Any = vision.patch_size
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    return int(rows * downsample_ratio) * int(columns * downsample_ratio)


def build_small_internvl(
    vision: dict[str, Any], text: dict[str, Any]
) -> tuple[InternVLForConditionalGeneration, TileProcessor]:
    """An untrained InternVL of the given shape, with the processor whose vocabulary it has.

    Args:
        vision: fields of `InternVLVisionConfig`.
        text: fields of `Qwen2Config` but the vocabulary's.
    """
    vision_config = InternVLVisionConfig(**vision)
    length = tokens_per_tile(vision_config)
    processor = scene_tile_processor(vision["image_size"], length)
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        vision_config=vision_config,
        text_config=Qwen2Config(**text | text_fields(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=length,
    )
    model = InternVLForConditionalGeneration(config).float()
    end_generation_like(model, tokenizer)
    return model, processor
