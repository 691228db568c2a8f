"""Where a base model is, whether it changed, and which weight files are read."""

import pytest
import torch
from torch import nn

from tokcom_hf.models.shared_wrapped_base import (
    check_weights,
    locate_base,
    matches_reference,
    read_weights,
    remove_weights,
)


def test_a_base_is_another_model_and_stays_where_it_is_allowed(tmp_path):
    assert locate_base("llava-hf/llava-1.5-7b-hf", tmp_path) == ("llava-hf/llava-1.5-7b-hf", None)
    assert locate_base(str(tmp_path / "other"), tmp_path) == (str(tmp_path / "other"), None)
    assert locate_base("./parts/base", tmp_path) == (str(tmp_path), "parts/base")
    for outside in ("../x", "./../x", "./base/../../x", "..\\x", str(tmp_path / ".." / "x")):
        with pytest.raises(ValueError, match="outside its folder"):
            locate_base(outside, tmp_path)
    for itself in ("./", ".", str(tmp_path), str(tmp_path) + "/", "user/model"):
        with pytest.raises(ValueError, match="names itself"):
            locate_base(itself, "user/model" if itself == "user/model" else tmp_path)
    with pytest.raises(ValueError, match="neither a Hub name nor an absolute path"):
        locate_base("a/b/c", tmp_path)


def test_any_change_of_the_base_is_seen():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def unloadable():
        raise OSError("no such folder")

    assert matches_reference(build().state_dict(), build)
    with_adapter = {n.replace("0.weight", "0.base_layer.weight"): v for n, v in build().state_dict().items()}
    assert matches_reference(with_adapter | {"0.lora_A.default.weight": torch.ones(1, 3)}, build)
    assert matches_reference(build().to("meta").state_dict(), build)
    changed = build()
    changed[1].bias.data[1] += 1e-7  # below what `_version` of the parameter would count
    resized = build()
    resized[1] = nn.Linear(4, 3)
    for other in (changed, resized, build().half(), build()[:1]):
        assert not matches_reference(other.state_dict(), build)
    assert not matches_reference(build().state_dict(), unloadable)


def test_weights_are_refused_by_name():
    expected = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(3)}
    good = {"a.weight": torch.ones(2, 2, dtype=torch.bfloat16), "b.weight": torch.ones(3)}
    check_weights(good, expected, "model.safetensors")
    for bad, message in (
        ({"a.weight": good["a.weight"]}, r"missing \['b.weight'\]"),
        (good | {"base.c": torch.ones(1)}, r"unexpected \['base.c'\]"),
        (good | {"b.weight": torch.ones(4)}, r"b.weight .* has shape \(4,\)"),
        (good | {"b.weight": torch.ones(3, dtype=torch.int8)}, "b.weight .* torch.int8"),
        (good | {"a.weight": torch.tensor([[1.0, float("nan")], [0, 0]])}, "a.weight .* NaN or infinite"),
        (good | {"b.weight": torch.tensor([1.0, float("-inf"), 0])}, "b.weight .* NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            check_weights(bad, expected, "model.safetensors")


def test_shards_and_variants_are_read_and_stale_files_are_not(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    for options in ({}, {"variant": "fp16"}, {"max_shard_size": "1KB"}, {"max_shard_size": "1KB", "variant": "fp16"}):
        folder = tmp_path / str(len(options))
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        remove_weights(folder, options.get("variant"))
        model.save_pretrained(folder, **options)
        weights = read_weights(folder, options.get("variant"))
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(OSError, match="has no weights"):
        read_weights(tmp_path)
