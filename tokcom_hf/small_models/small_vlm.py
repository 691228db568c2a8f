"""The small LLaVA that `recipes/pretrain_vlm.py` trains: CLIP images, the scenes' tokenizer, a Llama."""

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
    """A `LlavaProcessor` for square images of `image_size` pixels, `(image_size / patch_size)²` tokens per image."""
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
    """An untrained LLaVA of the given shape, in float32, with the processor's vocabulary.

    Args:
        vision: of the CLIP tower; images are square.
        text: fields of `LlamaConfig` except those that the vocabulary decides.
        processor: from `scene_processor`, of the same image and patch size.
    """
    tokenizer = processor.tokenizer
    image_size: Any = vision.image_size
    patch_size: Any = vision.patch_size
    # Names that every config takes, without being fields of this one.
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
