"""Inputs of InternVL models without torchvision, and a small InternVL for procedural scenes.

The `InternVLProcessor` of transformers needs torchvision for its video part. Joint LFQ training uses one tile per image and
no video, so `TileProcessor` combines a tokenizer and an image processor without it. It works for InternVL checkpoints in the
format of `OpenGVLab/InternVL3-1B-hf` and for the small model.
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
    """Processor of text and images for an InternVL model, with one tile per image.

    Args:
        tokenizer: tokenizer with the attributes of `IMAGE_TOKENS`, such as InternVL's.
        image_processor: image processor, called with `crop_to_patches=False`.
        image_seq_length: number of vision tokens per tile.

    Raises:
        ValueError: the tokenizer lacks one of the attributes.
    """

    def __init__(self, tokenizer, image_processor, image_seq_length: int):
        missing = [name for name in IMAGE_TOKENS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}; TileProcessor needs an InternVL checkpoint in transformers' "
                "format, such as OpenGVLab/InternVL3-1B-hf."
            )
        self.tokenizer, self.image_processor, self.image_seq_length = tokenizer, image_processor, image_seq_length
        self.image_token = tokenizer.context_image_token
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "TileProcessor":
        """Loads tokenizer, image processor and tokens per tile of a checkpoint (folder or Hub id).

        Raises:
            ValueError: the checkpoint is no InternVL model in transformers' format.
        """
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, InternVLConfig):
            raise ValueError(
                f"{str(name)!r} is a {config.model_type!r} model; joint LFQ training needs an InternVL model in the "
                "format of OpenGVLab/InternVL3-1B-hf."
            )
        tokenizer, image_processor = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        return cls(tokenizer, image_processor, config.image_seq_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves tokenizer and image processor."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def __call__(self, text, images=None, return_tensors: str = "pt", padding: bool = True) -> dict[str, Any]:
        """Makes model inputs of texts and images; each `image_token` in the texts stands for the next image."""
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
    """Builds a processor of the procedural scenes' tokenizer and square images of `image_size` pixels per side."""
    tokenizer = scene_tokenizer(IMAGE_TOKENS)
    size = {"height": image_size, "width": image_size}
    return TileProcessor(tokenizer, GotOcr2ImageProcessorPil(size=size, crop_to_patches=False), image_seq_length)


def tokens_per_tile(vision: InternVLVisionConfig, downsample_ratio: float = 0.5) -> int:
    """Number of vision tokens per tile in the language model: patches times downsample_ratio²."""
    size: Any = vision.image_size
    patch: Any = vision.patch_size
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    return int(rows * downsample_ratio) * int(columns * downsample_ratio)


def build_small_internvl(
    vision: dict[str, Any], text: dict[str, Any]
) -> tuple[InternVLForConditionalGeneration, TileProcessor]:
    """Builds an untrained InternVL, in float32, and its processor.

    Args:
        vision: fields of `InternVLVisionConfig`.
        text: fields of `Qwen2Config`, except those that follow from the tokenizer.
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
