"""PrunedVLM as a Hub model: strategies, heads, files, pipeline, and what it says about bad input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

from tests.helpers.pruned_vlm_tools import FAMILIES, IMAGE, batch, tiny_vlm
from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMerger,
    TokenMergerConfig,
)
from tokcom_hf.data.scenes import render_scene
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.models.pruning_flops import decoder_layer_flops
from tokcom_hf.models.pruning_strategies import STRATEGIES
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor

MERGER = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [5, 2], "internal_size": 16}


def with_heads(family="llava", **merger):
    sizes = {"llava": 16, "internvl": 64, "qwen2_5_vl": 32}
    config = TokenMergerConfig(**MERGER | {"feature_size": sizes[family]} | merger)
    return PrunedVLM.from_base(tiny_vlm(family), config, LayerPrunerConfig(**PRUNER)).eval()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_strategies_keep_the_wanted_number_on_every_family(family, strategy):
    model = PrunedVLM.from_base(tiny_vlm(family), strategy=strategy, keep=5)
    inputs = batch(family, images=(1, 2))
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape == (2, inputs["input_ids"].shape[1] + 3)
    expected = [24.0, 24.0, 7.5, 7.5] if strategy == "fastv" else [7.5] * 4
    assert model.token_report()["vision_tokens_per_layer"] == expected
    by_row = model.token_report()["vision_tokens_by_row"]
    beams = model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 4
    assert model.token_report()["vision_tokens_by_row"] == by_row and len(by_row) == 2


@pytest.mark.parametrize("name", ["tome", "visionzip", "divprune", "pool", "uniform", "random"])
def test_strategies_return_sorted_distinct_places_and_keep_everything_when_asked(name):
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    values, index = STRATEGIES[name](features, 16, None, torch.Generator().manual_seed(0))
    assert index.tolist() == list(range(16)) and torch.allclose(values, features, atol=1e-6)
    values, index = STRATEGIES[name](features, 5, None, torch.Generator().manual_seed(0))
    assert values.shape == (5, 8) and index.tolist() == sorted(set(index.tolist()))


def test_divprune_prefers_the_odd_token_and_tome_merges_the_twins():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [0.0, 1.0]])
    assert 3 in STRATEGIES["divprune"](features, 2)[1]
    merged, _ = STRATEGIES["tome"](features, 2)
    assert (merged - torch.tensor([0.0, 1.0])).norm(dim=-1).min() < 1e-6


@pytest.mark.parametrize("kind", ["simple", "question_aware", "fixed_pooling"])
def test_merger_shapes_column_sums_and_norms(kind):
    torch.manual_seed(0)
    merger = TokenMerger(TokenMergerConfig(**MERGER | {"merger_type": kind}))
    features, question = torch.randn(2, 16, 16), torch.randn(2, 5, 32)
    output = merger(features, question, torch.ones(2, 5))
    assert output.merged_features.shape == (2, 8, 16) and output.merge_weights.shape == (2, 16, 8)
    assert torch.allclose(output.merge_weights.sum(1), torch.ones(2, 8), atol=1e-5)
    assert output.merged_features.norm(dim=-1).max() <= features.norm(dim=-1).max() * 1.001
    output.merged_features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in merger.named_parameters() if "scorer" in n)


def test_question_decides_how_many_tokens_stay():
    torch.manual_seed(0)
    config = TokenMergerConfig(
        feature_size=16, question_size=32, merge_ratio=0.9, question_dependent_ratio=True, internal_size=16
    )
    merger = TokenMerger(config).eval()
    with torch.no_grad():
        merger.ratio_head.weight.normal_(0, 3)
    output = merger(torch.randn(6, 16, 16), torch.randn(6, 5, 32))
    assert len(set(output.keep_mask.sum(-1).tolist())) > 1
    model = PrunedVLM.from_base(tiny_vlm("llava"), merger).eval()
    model.generate(**batch("llava", images=(1, 2)), max_new_tokens=2)


@torch.no_grad()
def test_attention_guided_merger_reads_the_tower():
    model = with_heads(attention_guided=True)
    assert torch.isfinite(model(**batch("llava")).logits).all()


def test_pruner_budget_threshold_and_bad_layer():
    torch.manual_seed(0)
    pruner = LayerPruner(LayerPrunerConfig(**PRUNER)).eval()
    hidden, question = torch.randn(2, 10, 32), torch.randn(2, 4, 32)
    images = torch.tensor([[0] * 10, [0] * 5 + [1] * 5])
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 7:] = False
    output = pruner(2, hidden, question, vision_mask=mask, images=images)
    assert output.keep_mask.sum(-1).tolist() == [2, 4] and not output.keep_mask[0, 7:].any()
    ratio = LayerPruner(LayerPrunerConfig(hidden_size=32, layers=[1], keep_ratio=0.5, internal_size=16)).eval()
    assert ratio(1, hidden, question).keep_mask.sum(-1).tolist() == [5, 5]
    free = LayerPruner(LayerPrunerConfig(**PRUNER | {"selection": "threshold"})).eval()
    output = free(1, hidden, question)
    assert torch.equal(output.keep_mask, output.keep_logits > 0)
    with pytest.raises(ValueError, match="no head for layer 3"):
        pruner(3, hidden, question)


def test_flops_formula_and_discriminator():
    class Shape:
        hidden_size, num_attention_heads, num_key_value_heads, intermediate_size, head_dim = 8, 2, 1, 16, 4

    # 10 tokens: projections 2·10·8·(8 + 2·4) + 2·10·8·8, scores 4·100·8, MLP 6·10·8·16
    assert decoder_layer_flops(Shape, 10) == 2560 + 1280 + 3200 + 7680
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16))
    logits = critic([torch.randn(2, 5, 32)] * 3, torch.ones(2, 5))
    assert logits.shape == (2,)
    before = critic.networks[0][1].weight.clone()
    critic.reinitialize()
    assert not torch.equal(before, critic.networks[0][1].weight)


@torch.no_grad()
def test_text_only_prompt_passes_through():
    model = with_heads()
    inputs = batch("llava", images=(0, 0))
    assert torch.equal(model(**inputs).logits, model(**inputs, pruning_mode="origin").logits)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    assert model.token_report()["flops_ratio"] == 1.0
    mixed = batch("llava", images=(0, 1))
    single = {k: v[1:] if k != "pixel_values" else v for k, v in mixed.items()}
    assert torch.allclose(model(**mixed).logits[1, -1], model(**single).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_generates_what_bfloat16_without_a_cache_would(family):
    model = with_heads(family).to(torch.bfloat16)
    inputs = batch(family)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    start = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (2, start + 4)
    assert model.token_report()["vision_tokens_per_layer"] == [8, 5, 2, 2]
    first = model(**inputs).logits[:, -1].float()
    assert output.logits[0].dtype in (torch.bfloat16, torch.float32) and torch.isfinite(first).all()
    torch.testing.assert_close(output.logits[0].float(), first, atol=0.05, rtol=0.05)


def test_bad_input_says_what_is_wrong():
    model, inputs = with_heads(), batch("llava", images=(1, 1))
    without = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)}
    with pytest.raises(ValueError, match="every image needs its '<image>'"):
        model(**without)
    with pytest.raises(ValueError, match="every image needs its '<image>'"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="placeholders but no image"):
        model.generate(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="videos are not supported"):
        model(**inputs, pixel_values_videos=torch.zeros(1))
    with pytest.raises(ValueError, match="keep=40 is more than"):
        PrunedVLM.from_base(tiny_vlm("llava"), strategy="random", keep=40)(**inputs)
    with pytest.raises(ValueError, match="target_merge_tokens=40 is more than"):
        with_heads(target_merge_tokens=40)(**inputs)
    with pytest.raises(ValueError, match=r"keep_tokens=\[5, 2\] wants more than the 4 vision tokens"):
        with_heads(target_merge_tokens=4)
    with pytest.raises(ValueError, match="must lie in 0 … 3"):
        PrunedVLM.from_base(tiny_vlm("llava"), layer_pruner=LayerPrunerConfig(hidden_size=32))
    with pytest.raises(ValueError, match="Unknown strategy 'best'"):
        PrunedVLM.from_base(tiny_vlm("llava"), strategy="best", keep=3)
    with pytest.raises(ValueError, match="needs keep"):
        PrunedVLM.from_base(tiny_vlm("llava"), strategy="random")
    with pytest.raises(ValueError, match="pruning_mode must be one of"):
        model.pruning_mode = "fast"
    with pytest.raises(ValueError, match="KV cache only"):
        model.generate(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="merger_type must be"):
        TokenMergerConfig(merger_type="best")
    with pytest.raises(ValueError, match="one falling number per layer"):
        LayerPrunerConfig(layers=[1, 2], keep_tokens=[3, 5])
    with pytest.raises(ValueError, match="does not support 'clip_vision_model'"):
        PrunedVLM.from_base(torch.nn.Module.__new__(Unsupported))


class Unsupported(torch.nn.Module):
    config = CLIPVisionConfig()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in the format of llava-hf/llava-1.5-7b-hf: model and processor of the small VLM, tiny."""
    folder = tmp_path_factory.mktemp("llava")
    processor = scene_processor(32, 8)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = build_small_llava(vision, text | {"num_key_value_heads": 2}, processor)
    assert isinstance(model, LlavaForConditionalGeneration)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


@pytest.mark.parametrize("include_base", [False, True])
@torch.no_grad()
def test_round_trip_by_reference_and_whole(checkpoint, tmp_path, include_base):
    folder, processor = checkpoint
    model = PrunedVLM.from_base(str(folder), TokenMergerConfig(**MERGER), LayerPrunerConfig(**PRUNER)).eval()
    model.save_pretrained(tmp_path / "saved", include_base=include_base)
    assert (tmp_path / "saved" / "base").exists() == include_base
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    inputs = VQACollator(processor, answers=False)([scene_rows(1, 0, image_size=32)[0]])
    for auto in (AutoModel, AutoModelForImageTextToText):
        again = auto.from_pretrained(tmp_path / "moved")
        assert isinstance(again, PrunedVLM) and torch.equal(again(**inputs).logits, model(**inputs).logits)
    for head, kind in ((model.token_merger, TokenMerger), (model.layer_pruner, LayerPruner)):
        head.save_pretrained(tmp_path / "head")
        loaded = AutoModel.from_pretrained(tmp_path / "head")
        assert isinstance(loaded, kind)
        assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), loaded.state_dict().values()))
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16)).eval()
    critic.save_pretrained(tmp_path / "critic")
    states, answers = [torch.randn(2, 5, 32)] * 3, torch.ones(2, 5)
    assert torch.allclose(
        AutoModel.from_pretrained(tmp_path / "critic").eval()(states, answers), critic(states, answers)
    )
    if include_base:
        scene = render_scene_row()
        answer = pipeline("pruned-image-text-to-text", model=again, processor=processor)(scene, max_new_tokens=2)
        assert isinstance(answer["generated_text"], str) and answer["token_report"]["vision_tokens"] == 16
        with pytest.raises(ValueError, match="put one '<image>' per image"):
            pipeline("pruned-image-text-to-text", model=again, processor=processor)(scene | {"text": "what ?"})


def render_scene_row():
    import random

    from tokcom_hf.data.scenes import sample_scene

    return {"image": render_scene(sample_scene(random.Random(0)), 32), "text": "<image> what colour is the dot ?"}


@torch.no_grad()
def test_folder_loads_in_a_process_without_the_package(checkpoint, tmp_path):
    folder, processor = checkpoint
    model = PrunedVLM.from_base(str(folder), TokenMergerConfig(**MERGER), LayerPrunerConfig(**PRUNER)).eval()
    model.save_pretrained(tmp_path / "whole", include_base=True)
    inputs = VQACollator(processor, answers=False)([scene_rows(1, 0, image_size=32)[0]])
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, json, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'tokcom_hf': raise ImportError('tokcom_hf is not installed')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from transformers import AutoModelForImageTextToText as A\n"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "i = torch.load(sys.argv[2])\n"
        "print(json.dumps([m(**i).logits.double().sum().item(), m.generate(**i, max_new_tokens=3).tolist()]))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "whole"), str(tmp_path / "inputs.pt")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    total, ids = json.loads(done.stdout.splitlines()[-1])
    assert abs(total - model(**inputs).logits.double().sum().item()) < 1e-3
    assert ids == model.generate(**inputs, max_new_tokens=3).tolist()
