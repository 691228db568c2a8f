"""The processor of the small LLaVA that `recipes/pretrain_vlm.py` trains: CLIP images and the scenes' tokenizer."""

from transformers import CLIPImageProcessor, LlavaProcessor

from .scene_tokenizer import scene_tokenizer


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
