"""The families whose tokens come projected: in `origin` mode they are the base, whatever tiles and windows they have."""

import pytest
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
from tokcom_hf import LayerPrunerConfig, PrunedVLM

PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [6, 3], "internal_size": 16}


@torch.no_grad()
def check(base, inputs, real):
    model = PrunedVLM.from_base(base, layer_pruner=LayerPrunerConfig(**PRUNER)).eval()
    assert torch.equal(model(**inputs, pruning_mode="origin").logits[real], base(**inputs).logits[real])
    everything = PrunedVLM.from_base(
        base, layer_pruner=LayerPrunerConfig(**PRUNER | {"keep_tokens": [500, 500]})
    ).eval()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(everything.generate(**inputs, **greedy), base.generate(**inputs, **greedy))
    model.generate(**inputs, **greedy)
    return model.token_report()


def test_qwen2_vl():
    torch.manual_seed(0)
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        vision_config=vision, text_config=TEXT | {"rope_parameters": rope}, image_token_id=IMAGE, video_token_id=98,
        vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    inputs = batch("qwen2_5_vl", images=(1, 2))
    report = check(Qwen2VLForConditionalGeneration(config).eval(), inputs, inputs["attention_mask"].bool())
    assert report["vision_tokens_per_layer"] == [24, 9, 4.5, 4.5]


def test_llava_next():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    base = LlavaNextForConditionalGeneration(config).eval()
    images = {"pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]])}
    with torch.no_grad():
        tokens = sum(len(f) for f in base.model.get_image_features(**images).pooler_output)
    ids = torch.tensor([[1, 2, 3] + [IMAGE] * tokens + [4, 5, 6]])
    inputs = images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    report = check(base, inputs, inputs["attention_mask"].bool())
    assert report["vision_tokens_per_layer"] == [tokens, 6, 3, 3]


def test_llava_onevision():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, video_token_id=98,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], vision_feature_select_strategy="default",
    )  # fmt: skip
    base = LlavaOnevisionForConditionalGeneration(config).eval()
    # One image in tiles, then two images of one tile each.
    for images in (
        {"pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]])},
        {
            "pixel_values": torch.randn(2, 1, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16], [16, 16]]),
            "batch_num_images": torch.tensor([2]),
        },
    ):
        inputs = prompt_of(base, images)
        report = check(base, inputs, inputs["attention_mask"].bool())
        count = 1 if len(images) == 2 else 2
        assert report["vision_tokens_per_layer"][1:] == [6 * count, 3 * count, 3 * count]


def test_mistral3_and_its_window():
    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    text = MistralConfig(**TEXT, head_dim=8, sliding_window=48)
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, spatial_merge_size=2)
    base = Mistral3ForConditionalGeneration(config).eval()
    inputs = prompt_of(
        base, {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32], [16, 32]])}
    )
    assert check(base, inputs, inputs["attention_mask"].bool())["vision_tokens_per_layer"] == [24, 12, 6, 6]
    model = PrunedVLM.from_base(base, strategy="uniform", keep=3)
    with pytest.raises(ValueError, match="window holds 48 tokens and prompt and answer take 49"):
        model.generate(**inputs, max_new_tokens=60, do_sample=False)


def test_aya_vision():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    kinds = ["sliding_attention", "full_attention"] * 2
    config = AyaVisionConfig(
        vision_config=vision, text_config=Cohere2Config(**TEXT, layer_types=kinds, sliding_window=64),
        image_token_id=IMAGE, downsample_factor=2, adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    base = AyaVisionForConditionalGeneration(config).eval()
    inputs = prompt_of(base, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert check(base, inputs, inputs["attention_mask"].bool())["vision_tokens_per_layer"] == [32, 12, 6, 6]


@torch.no_grad()
def prompt_of(base, images):
    """Text around as many placeholders as the images give tokens."""
    parts = base.model.get_image_features(**images).pooler_output
    ids = [1, 2, 3]
    for part in parts:
        ids += [IMAGE] * len(part) + [4]
    ids = torch.tensor([[*ids, 5, 6]])
    return images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
