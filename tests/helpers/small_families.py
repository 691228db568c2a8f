"""Tiny random VLMs of the families with tiles, windows and images of any size, each with a prompt of several images."""

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.helpers.pruned_vlm_tools import IMAGE, TEXT, batch

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def qwen2_vl():
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        vision_config=vision, text_config=TEXT | {"rope_parameters": rope}, image_token_id=IMAGE, video_token_id=98,
        vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    return seeded(Qwen2VLForConditionalGeneration, config), batch("qwen2_5_vl", images=(1, 2))


def llava_next():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SHAPE, image_size=16), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    base = seeded(LlavaNextForConditionalGeneration, config)
    return base, prompt_of(base, {"pixel_values": pixels(2, 5, 3, 16, 16), "image_sizes": sizes((32, 32), (32, 24))})


def llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config=CLIPVisionConfig(**SHAPE, image_size=16), text_config=Qwen2Config(**TEXT), image_token_id=IMAGE,
        video_token_id=98, image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="default",
    )  # fmt: skip
    base = seeded(LlavaOnevisionForConditionalGeneration, config)
    images = {"pixel_values": pixels(2, 5, 3, 16, 16), "image_sizes": sizes((32, 32), (32, 24))}
    return base, prompt_of(base, images)


def mistral3(window: int | None = None):
    text = MistralConfig(**TEXT, head_dim=8, sliding_window=window)
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**SHAPE, image_size=32),
        text_config=text,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    base = seeded(Mistral3ForConditionalGeneration, config)
    return base, prompt_of(base, {"pixel_values": pixels(2, 3, 32, 32), "image_sizes": sizes((32, 32), (16, 32))})


def aya_vision():
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**SHAPE, image_size=32),
        text_config=Cohere2Config(**TEXT, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64),
        image_token_id=IMAGE, downsample_factor=2, adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    base = seeded(AyaVisionForConditionalGeneration, config)
    return base, prompt_of(base, {"pixel_values": pixels(2, 3, 32, 32)})


def seeded(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sizes(*pairs):
    return torch.tensor(pairs)


@torch.no_grad()
def prompt_of(base, images):
    """Text around as many placeholders as the images give tokens."""
    parts = base.model.get_image_features(**images).pooler_output
    ids = [1, 2, 3]
    for part in parts:
        ids += [IMAGE] * len(part) + [4]
    ids = torch.tensor([[*ids, 5, 6]])
    return images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


OTHER_FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "aya_vision": aya_vision,
}
