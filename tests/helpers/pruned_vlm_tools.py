"""Tiny random VLMs of every supported family and batches for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

IMAGE, PAD = 99, 0
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = ("llava", "internvl", "qwen2_5_vl")
TOKENS = 16


def tiny_vlm(family: str, attention: str = "sdpa", layers: int = 4):
    """A random VLM with 16 vision tokens per image."""
    torch.manual_seed(0)
    text = TEXT | {"num_hidden_layers": layers}
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, vision_feature_layer=-2
        )
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    elif family == "internvl":
        vision = InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=[4, 4],
        )
        config = InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE, downsample_ratio=0.5
        )
        model = InternVLForConditionalGeneration._from_config(config, attn_implementation=attention)
    else:
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        }
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = Qwen2_5_VLConfig(
            vision_config=vision, text_config=text | {"rope_parameters": rope}, image_token_id=IMAGE, video_token_id=98,
            vision_start_token_id=97, vision_end_token_id=96,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    # Larger weights than the default initialisation, so that every token matters.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model.float().eval()


def batch(family: str, side: str = "left", images: tuple[int, ...] = (1, 1), seed: int = 0) -> dict:
    """Rows of different text length, padded on one side, with so many images per row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, count in enumerate(images):
        ids = torch.randint(1, 90, (3,), generator=generator).tolist()
        for _ in range(count):
            ids += [IMAGE] * TOKENS + [91]
        ids += torch.randint(1, 90, (3 + 2 * row,), generator=generator).tolist()
        rows.append(ids)
    length = max(map(len, rows))
    pad = [[PAD] * (length - len(ids)) for ids in rows]
    ids = [p + r if side == "left" else r + p for p, r in zip(pad, rows)]
    real = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for p, r in zip(pad, rows)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}
    total = sum(images)
    if total and family == "qwen2_5_vl":
        inputs["pixel_values"] = torch.randn(total * 64, 3 * 16, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * total)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    elif total:
        size = 16 if family == "llava" else 32
        inputs["pixel_values"] = torch.randn(total, 3, size, size, generator=generator)
    return inputs


def mixed_sizes():
    """A Qwen2.5-VL prompt with an image of 4 and one of 15 tokens, whose windows are not all full."""
    ids = torch.tensor([[1, 2, *[IMAGE] * 4, 3, *[IMAGE] * 15, 4, 5]])
    grid = torch.tensor([[1, 4, 4], [1, 6, 10]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 48, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid,
    }  # fmt: skip
