"""A folder that does not hold exactly the model's weights is refused, with the tensor's name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tokcom_hf import (
    VQGAN,
    DenoisedModel,
    DenoisedModelConfig,
    TokComConfig,
    TokComModel,
    TokComVAE,
    TokComVAEConfig,
    VQGANConfig,
    VQGANDiscriminator,
    VQGANDiscriminatorConfig,
)

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
VQ = {
    "image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "channel_multipliers": [1, 2],
    "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1, "codebook_projection": True,
}  # fmt: skip
MODELS = {
    "vae": (lambda: TokComVAE(TokComVAEConfig(vocab_size=51, latent_size=16, **SHAPE)), "decoder.norm.weight"),
    "denoiser": (lambda: DenoisedModel(DenoisedModelConfig(latent_size=16, **SHAPE)), "layers.0.mlp.up_proj.weight"),
    "tokcom": (
        lambda: TokComModel(TokComConfig(vae={"vocab_size": 51, "latent_size": 16, **SHAPE}, denoiser=SHAPE)),
        "denoiser.norm.weight",
    ),
    "vqgan": (lambda: VQGAN(VQGANConfig(**VQ)), "quantizer.codebook"),
    "discriminator": (
        lambda: VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=2)),
        "layers.2.weight",
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request, tmp_path_factory):
    """A folder of each model, its tensors, and the name of one of them."""
    make, name = MODELS[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    make().save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors"), name


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
    with pytest.raises(ValueError, match=r"model has not, 1 tensor.*base\.proj\.weight"):
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
    MODELS["vae"][0]().save_pretrained(tmp_path)
    larger = TokComVAEConfig(vocab_size=60, latent_size=16, **SHAPE)
    with pytest.raises(RuntimeError, match="size"):
        TokComVAE.from_pretrained(tmp_path, config=larger)
    model = TokComVAE.from_pretrained(tmp_path, config=larger, ignore_mismatched_sizes=True)
    assert model.embed_tokens.weight.shape == (60, 32) and model.embed_tokens.weight.isfinite().all()
    assert model.lm_head.weight is model.embed_tokens.weight
