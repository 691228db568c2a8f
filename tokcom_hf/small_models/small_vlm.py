"""Builds the small LLaVA of `recipes/pretrain_vlm.py`: a CLIP tower, a Llama, and the tokenizer of procedural scenes."""

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .scene_tokenizer import end_generation_like, scene_tokenizer, text_fields


def scene_processor(image_size: int, patch_size: int) -> LlavaProcessor:
    """Builds a `LlavaProcessor` for images of `image_size`² pixels, (image_size / patch_size)² tokens each."""
    tokenizer = scene_tokenizer({"image_token": "<image>"})
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


def build_small_llava(
    vision: CLIPVisionConfig, text: dict[str, Any], processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """Builds an untrained LLaVA, in float32, with the processor's vocabulary.

    Args:
        vision: configuration of the CLIP tower; images are square.
        text: fields of `LlamaConfig`, except those that follow from the tokenizer.
        processor: processor from `scene_processor`, with the same image and patch size.
    """
    tokenizer = processor.tokenizer
    image_size: Any = vision.image_size
    patch_size: Any = vision.patch_size
    # Every config accepts these names, but type checkers do not know them.
    special: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids(processor.image_token),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text | text_fields(tokenizer)),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        **special,
    )
    model = LlavaForConditionalGeneration(config).float()
    end_generation_like(model, tokenizer)
    return model
