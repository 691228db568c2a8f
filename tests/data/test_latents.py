"""Latents files know the model that wrote them."""

import pytest
import torch
from safetensors.torch import save_file

from tokcom_hf import TokComConfig, TokComModel, TokComVAE, TokComVAEConfig
from tokcom_hf.data.latents import load_latents, save_latents, vae_fingerprint

SHAPE = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_hidden_layers": 1,
}  # fmt: skip


def tiny_vae(seed: int = 0, **changes) -> TokComVAE:
    torch.manual_seed(seed)
    return TokComVAE(TokComVAEConfig(**{"vocab_size": 31, "latent_size": 8, **SHAPE, **changes})).eval()


@pytest.fixture
def vae() -> TokComVAE:
    return tiny_vae()


@pytest.fixture
def written(vae, tmp_path):
    latents = [torch.randn(3, 8), torch.randn(1, 8)]
    return save_latents(tmp_path / "deep" / "a.safetensors", latents, [10, 4], vae), latents


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_several_texts_come_back_as_they_were(written, vae, suffix):
    path, latents = written
    if suffix == ".pt":
        path = save_latents(path.rename(path.with_suffix(".pt")), latents, [10, 4], vae)
    loaded, counts = load_latents(path, vae)
    assert counts == [10, 4]
    for one, other in zip(loaded, latents, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert [file.name for file in path.parent.iterdir()] == [f"a{suffix}"]


def test_the_whole_model_and_its_vae_and_its_bfloat16_copy_are_the_same_writer(written, vae, tmp_path):
    path, _ = written
    model = TokComModel(TokComConfig(vae=vae.config.to_dict(), denoiser=SHAPE))
    model.vae.load_state_dict(vae.state_dict())
    assert load_latents(path, model)[1] == [10, 4]
    model.save_pretrained(tmp_path / "model")
    again = TokComModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert vae_fingerprint(again) == vae_fingerprint(model) == vae_fingerprint(vae)
    with torch.no_grad():
        model.denoiser.norm.weight.add_(1)
    assert vae_fingerprint(model) == vae_fingerprint(vae)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "the weights of its VAE differ"),
        ({"chunk_size": 2}, "its chunk_size is 4, this model's is 2"),
        ({"latent_size": 6}, "its latent_size is 8, this model's is 6"),
    ],
)
def test_another_model_refuses_the_file(written, other, message):
    with pytest.raises(ValueError, match=message):
        load_latents(written[0], tiny_vae(**other))


def test_truncated_foreign_and_missing_files_are_refused(written, vae, tmp_path):
    path, _ = written
    whole = path.read_bytes()
    for size in (0, 5, 40, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            load_latents(path, vae)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="holds no TokCom latents"):
        load_latents(foreign, vae)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_latents(tmp_path / "none", vae)


def test_a_torch_file_of_latents_holds_tensors_and_is_checked_like_the_other_kind(vae, tmp_path):
    path = save_latents(tmp_path / "latents.pt", [torch.ones(3, 8)], [10], vae)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["latents"][0], torch.ones(3, 8)) and content["token_count"] == "[10]"
    with pytest.raises(ValueError, match="the weights of its VAE differ"):
        load_latents(path, tiny_vae(seed=1))
    for wrong in ({"weight": torch.zeros(2)}, [1]):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="holds no TokCom latents"):
            load_latents(path, vae)
    for content in (b"", b"no torch file"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or no torch file of tensors"):
            load_latents(path, vae)
    # Code is never run: only tensors, numbers and text are read.
    torch.save({"format": Unknown()}, path)
    with pytest.raises(ValueError, match="truncated or no torch file of tensors"):
        load_latents(path, vae)


class Unknown:
    """Anything that needs code to unpickle."""


def test_counts_that_do_not_fill_the_chunks_are_refused_and_nothing_is_written(vae, tmp_path):
    for count in (3 * 4 + 1, 8):
        with pytest.raises(ValueError, match="got 3 latents"):
            save_latents(tmp_path / "a.safetensors", [torch.zeros(3, 8)], [count], vae)
    assert not list(tmp_path.iterdir())
