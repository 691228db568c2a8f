"""Reported FLOPs against those that torch counts, and budgets where images have several sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.pruned_vlm_tools import FAMILIES, batch, mixed_sizes, tiny_vlm
from tokcom_hf import LayerPruner, LayerPrunerConfig, PrunedVLM, TokenMerger, TokenMergerConfig
from tokcom_hf.models.pruning_flops import vision_tower_flops

SIZES = {"llava": 16, "internvl": 64, "qwen2_5_vl": 32}


@torch.no_grad()
def counted(model, inputs, mode):
    """What torch counts per row in matrix products, without patch embedding and head, which the report leaves out."""
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs, pruning_mode=mode).logits
    total = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "conv" not in str(name))
    head = 2 * logits[..., 0].numel() * model.base.lm_head.weight.numel()
    return (total - head) / len(logits)


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@torch.no_grad()
def test_reported_flops_are_those_of_the_matrix_products(family):
    inputs = mixed_sizes() if family == "mixed" else batch(family, images=(2, 2))
    # Rows of one length, for torch counts padding, too; eager attention, for it does not know the CPU's fused one.
    if family != "mixed":
        inputs["input_ids"][0] = inputs["input_ids"][1]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs.pop("mm_token_type_ids", None)
    kind = "qwen2_5_vl" if family == "mixed" else family
    merger = TokenMergerConfig(
        feature_size=SIZES[kind], question_size=32, target_merge_tokens=8, internal_size=16, merger_type="simple"
    )
    for model in (
        PrunedVLM.from_base(tiny_vlm(kind, "eager"), merger).eval(),
        PrunedVLM.from_base(tiny_vlm(kind, "eager"), strategy="uniform", keep=4).eval(),
    ):
        for mode, name in (("origin", "flops_origin"), ("hard", "flops")):
            assert model(**inputs, pruning_mode=mode).logits.shape[0] == len(inputs["input_ids"])
            assert model.token_report()[name] == pytest.approx(counted(model, inputs, mode), rel=0.02)


def test_window_attention_and_gates_are_counted():
    config = tiny_vlm("qwen2_5_vl").config.vision_config
    width, inner = 16, 24
    products = 2 * 64 * (8 * width**2 + 6 * width * inner)
    # One layer of two attends to all 64 patches, the other within four windows of 16.
    assert vision_tower_flops(config, 64, [16] * 4) == products + 4 * width * (64**2 + 4 * 16**2)


@torch.no_grad()
def test_a_small_image_keeps_what_it_has():
    inputs = mixed_sizes()
    merger = TokenMergerConfig(feature_size=32, question_size=32, target_merge_tokens=8, internal_size=16)
    for options in ({"token_merger": merger}, {"strategy": "fastv", "keep": 8, "strategy_layer": 1}):
        model = PrunedVLM.from_base(tiny_vlm("qwen2_5_vl"), **options).eval()
        model(**inputs)
        assert model.token_report()["vision_tokens_per_layer"][-1] == 12
    for strategy in ("random", "uniform", "pool", "tome", "visionzip", "divprune"):
        model = PrunedVLM.from_base(tiny_vlm("qwen2_5_vl"), strategy=strategy, keep=8).eval()
        places = model(**inputs).kept_index[0][0]
        assert [int(((places >= a) & (places < b)).sum()) for a, b in ((2, 6), (7, 22))] == [4, 8]
    alone = TokenMerger(merger).eval()
    assert alone(torch.randn(1, 3, 32), torch.randn(1, 2, 32)).merged_features.shape == (1, 3, 32)


@torch.no_grad()
def test_no_image_loses_everything_at_a_threshold():
    config = LayerPrunerConfig(hidden_size=32, layers=[1], selection="threshold", internal_size=16)
    pruner = LayerPruner(config).eval()
    images = torch.tensor([[0] * 6 + [1] * 3 + [2]])
    hidden, question = torch.randn(1, 10, 32), torch.randn(1, 4, 32)
    pruner.heads["1"].score[-1].bias.fill_(-100.0)
    assert pruner(1, hidden, question, images=images).keep_mask[0].tolist().count(True) == 3
    for image in range(3):
        assert pruner(1, hidden, question, images=images).keep_mask[images == image].sum() == 1
    pruner.heads["1"].score[-1].bias.fill_(100.0)
    assert pruner(1, hidden, question, images=images).keep_mask.all()
