"""A folder that does not hold exactly the model's weights is refused, with the tensor's name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.helpers.tokcom_tools import VAE, small
from tokcom_hf import TokComVAE, TokComVAEConfig

TENSORS = {
    "vae": "decoder.norm.weight", "denoiser": "layers.0.mlp.up_proj.weight", "tokcom": "denoiser.norm.weight",
    "vqgan": "quantizer.codebook", "discriminator": "layers.2.weight",
}  # fmt: skip


@pytest.fixture(scope="module", params=list(TENSORS))
def saved(request, tmp_path_factory):
    """A folder of each model, its tensors, and the name of one of them."""
    folder = tmp_path_factory.mktemp(request.param)
    small(request.param).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors"), TENSORS[request.param]


def write(saved, path, **changes):
    folder, tensors, name = saved
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    kept = {key: value for key, value in tensors.items() if key != name or "value" not in changes}
    if changes.get("value") is not None:
        kept[name] = changes["value"]
    kept.update(changes.get("more", {}))
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_whole_folder_loads_and_is_the_same(saved, tmp_path):
    model = AutoModel.from_pretrained(write(saved, tmp_path))
    _, tensors, _ = saved
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())


def test_missing_and_unexpected_weights_are_named(saved, tmp_path):
    name = saved[2]
    with pytest.raises(ValueError, match=f"lacks 1 tensor.*{name}"):
        AutoModel.from_pretrained(write(saved, tmp_path, value=None))
    with pytest.raises(ValueError, match=r"unknown to the model, 1 tensor.*base\.proj\.weight"):
        AutoModel.from_pretrained(write(saved, tmp_path, more={"base.proj.weight": torch.zeros(3)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, value):
    _, tensors, name = saved
    broken = tensors[name].clone()
    broken.view(-1)[1] = value
    with pytest.raises(ValueError, match=f"1 of .* values of {name} are NaN or infinite"):
        AutoModel.from_pretrained(write(saved, tmp_path, value=broken))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_quantized_weights_are_named(saved, tmp_path, dtype):
    _, tensors, name = saved
    with pytest.raises(ValueError, match=f"{name} is stored as {dtype}"):
        AutoModel.from_pretrained(write(saved, tmp_path, value=tensors[name].to(dtype)))


def test_a_state_dict_of_the_caller_is_checked_too(saved):
    folder, tensors, name = saved
    kind = type(AutoModel.from_pretrained(folder))
    config = kind.config_class.from_pretrained(folder)
    kind.from_pretrained(None, config=config, state_dict=dict(tensors))
    with pytest.raises(ValueError, match=f"{name} is stored as torch.int8"):
        kind.from_pretrained(None, config=config, state_dict=tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(ValueError, match=f"lacks 1 tensor.*{name}"):
        kind.from_pretrained(
            None, config=config, state_dict={key: value for key, value in tensors.items() if key != name}
        )


def test_shards_are_checked(saved, tmp_path):
    _, tensors, name = saved
    broken = tensors[name].clone()
    broken.view(-1)[0] = float("nan")
    parts = {"a.safetensors": {name: broken}, "b.safetensors": {k: v for k, v in tensors.items() if k != name}}
    write(saved, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"values of {name} are NaN"):
        AutoModel.from_pretrained(tmp_path)


def test_other_sizes_load_where_they_are_ignored_on_purpose(tmp_path):
    small("vae").save_pretrained(tmp_path)
    larger = TokComVAEConfig(**VAE | {"vocab_size": 60})
    with pytest.raises(RuntimeError, match="size"):
        TokComVAE.from_pretrained(tmp_path, config=larger)
    with pytest.raises(
        RuntimeError, match=r"weight is stored with shape \(\d+, 32\), but config.json asks for \(60, 32\)"
    ):
        TokComVAE.from_pretrained(tmp_path, config=larger)
    model = TokComVAE.from_pretrained(tmp_path, config=larger, ignore_mismatched_sizes=True)
    assert model.embed_tokens.weight.shape == (60, 32) and model.embed_tokens.weight.isfinite().all()
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_cut_file_is_named(tmp_path):
    small("vae").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"model.safetensors is damaged or was cut short"):
        AutoModel.from_pretrained(tmp_path)
