"""The optional improvements that the pruning documents list, and their remedies against running out of memory."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tokcom_hf import LayerPruner, LayerPrunerConfig, PrunedVLM

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from pruned_vlm_tools import FAMILIES, batch, tiny_vlm


# ---------------------------------------------------------------------- hierarchical schedules
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_has_its_own_ratio(family):
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 2, 3], keep_ratio=[0.75, 0.5, 0.34], internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm(family), layer_pruner=pruner).eval()
    model.generate(**batch(family), max_new_tokens=2)
    # 16 tokens: 12 before layer 1, 6 of them before layer 2, 2 of those before layer 3.
    assert model.token_report()["vision_tokens_per_layer"] == [16, 12, 6, 2]


def test_a_schedule_of_ratios_is_saved_and_one_number_is_the_same_at_every_layer(tmp_path):
    listed = LayerPruner(
        LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_ratio=[0.5, 0.5], internal_size=16)
    ).eval()
    listed.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.keep_ratio == [0.5, 0.5]
    single = LayerPruner(LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_ratio=0.5, internal_size=16)).eval()
    single.load_state_dict(listed.state_dict())
    hidden, question = torch.randn(2, 9, 32), torch.randn(2, 3, 32)
    for layer in (1, 2):
        kept = [pruner(layer, hidden, question).keep_mask for pruner in (listed, again, single)]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_schedule_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"one per layer \[10, 20, 31\]: 3, got \[0.7, 0.5\]"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5])
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got \[0.7, 0.5, 0.0\]"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5, 0.0])
    with pytest.raises(ValueError, match="are two schedules; give one of them"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5, 0.3], keep_tokens=[20, 10, 5])
    with pytest.raises(ValueError, match="one falling number per layer"):
        LayerPrunerConfig(keep_tokens=[20, 10])


def test_the_recipe_takes_a_schedule():
    import train_token_pruning as recipe

    from tokcom_hf.cli import parse_recipe

    given = ["--layers", "1", "2", "3", "--keep_tokens", "null", "--keep_ratio", "0.7", "0.5", "0.3"]
    values = parse_recipe(recipe.__doc__, recipe.SECTIONS, recipe.DEFAULT_CONFIG, given)
    config = LayerPrunerConfig(**values["pruner"] | {"hidden_size": 32})
    assert config.keep_ratio == [0.7, 0.5, 0.3] and config.keep_tokens is None
