"""The families whose tokens come projected: in `origin` mode they are the base, whatever tiles and windows they have."""

import pytest
import torch

from tests.helpers.small_families import (
    aya_vision,
    llava_next,
    llava_onevision,
    mistral3,
    pixels,
    prompt_of,
    qwen2_vl,
    sizes,
)
from tokcom_hf import LayerPrunerConfig, PrunedVLM

PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [6, 3], "internal_size": 16}


@torch.no_grad()
def check(base, inputs):
    real = inputs["attention_mask"].bool()
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
    assert check(*qwen2_vl())["vision_tokens_per_layer"] == [24, 9, 4.5, 4.5]


def test_llava_next():
    base, _ = llava_next()
    inputs = prompt_of(base, {"pixel_values": pixels(1, 5, 3, 16, 16), "image_sizes": sizes((32, 32))})
    report = check(base, inputs)
    # Three ids before the image's, three behind.
    assert report["vision_tokens_per_layer"] == [inputs["input_ids"].shape[1] - 6, 6, 3, 3]


def test_llava_onevision():
    base, _ = llava_onevision()
    # One image in tiles, then two images of one tile each.
    tiles = {"pixel_values": pixels(1, 5, 3, 16, 16), "image_sizes": sizes((32, 32))}
    pair = {"pixel_values": pixels(2, 1, 3, 16, 16), "image_sizes": sizes((16, 16), (16, 16))}
    for count, images in ((1, tiles), (2, pair | {"batch_num_images": torch.tensor([2])})):
        report = check(base, prompt_of(base, images))
        assert report["vision_tokens_per_layer"][1:] == [6 * count, 3 * count, 3 * count]


def test_mistral3_and_its_window():
    base, inputs = mistral3(window=48)
    assert check(base, inputs)["vision_tokens_per_layer"] == [24, 12, 6, 6]
    model = PrunedVLM.from_base(base, strategy="uniform", keep=3)
    with pytest.raises(ValueError, match="window holds 48 tokens and prompt and answer take 49"):
        model.generate(**inputs, max_new_tokens=60, do_sample=False)


def test_aya_vision():
    assert check(*aya_vision())["vision_tokens_per_layer"] == [32, 12, 6, 6]
