"""tokcom_hf/tokcom_inference.py: the documented functions, whose every argument acts or is refused."""

import pytest
import torch

from tokcom_hf import DenoisedModel, ModelArgs, TokComConfig, TokComModel, TokComVAE
from tokcom_hf.tokcom_checkpoint_writer import save_checkpoint
from tokcom_hf.tokcom_inference import decode, denoise_reconstruct, encode, generate, load_checkpoint, reconstruct

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**settings) -> TokComModel:
    torch.manual_seed(0)
    parts = {"vae": {"vocab_size": 51, **SHAPE}, "denoiser": SHAPE, "max_chunks": 8}
    model = TokComModel(TokComConfig(**parts | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> TokComModel:
    return small(noise_std=0.7)


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "best_diffusion.pt"
    save_checkpoint(path, model, epoch=2, val_loss=0.5, tokenizer_path="tokens")
    return load_checkpoint(path, device="cpu")


IDS = torch.randint(0, 50, (2, 16), generator=seeded(1))


def test_a_checkpoint_gives_two_models_attributes_and_a_dictionary(loaded):
    vae_model, denoised_model, model_args, config = loaded
    assert isinstance(vae_model, TokComVAE) and isinstance(denoised_model, DenoisedModel)
    assert isinstance(model_args, ModelArgs) and not (vae_model.training or denoised_model.training)
    assert {name: getattr(model_args, name) for name in SHAPE} == SHAPE
    assert (model_args.vocab_size, model_args.omni_token_id) == (51, 50)
    assert config == {"tokenizer_path": "tokens", "max_length": 32, "chunk_size": 4, "noise_std": 0.7}


def test_model_args_have_the_documented_defaults_and_build_the_documented_models():
    model_args = ModelArgs()
    assert (model_args.hidden_size, model_args.num_hidden_layers, model_args.num_attention_heads) == (896, 24, 14)
    assert (model_args.num_key_value_heads, model_args.intermediate_size) == (2, 4864)
    with torch.device("meta"):
        vae, denoiser = TokComVAE(model_args.vae_config()), DenoisedModel(model_args.denoiser_config())
    assert len(vae.encoder.layers) == len(vae.decoder.layers) == len(denoiser.layers) == 24


def test_every_argument_of_generate_acts_or_is_refused(loaded, model):
    vae_model, denoised_model, model_args, config = loaded
    documented = {
        "num_chunks": 6, "chunk_size": 4, "hidden_size": model_args.hidden_size, "noise_std": config["noise_std"],
        "num_steps": 5, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    ids = generate(vae_model, denoised_model, **documented, generator=seeded())
    assert torch.equal(ids, model.generate(num_chunks=6, num_steps=5, batch_size=2, generator=seeded()))
    assert ids.shape == (2, 24)
    for name, value in (("noise_std", 2.0), ("num_steps", 2), ("num_chunks", 3), ("batch_size", 1)):
        other = generate(vae_model, denoised_model, **documented | {name: value}, generator=seeded())
        assert not torch.equal(ids, other), name
    for name in ("chunk_size", "hidden_size"):
        with pytest.raises(ValueError, match=f"{name}=7 contradicts the model"):
            generate(vae_model, denoised_model, **documented | {name: 7})
    for name, value in (("num_steps", 0), ("num_chunks", 0), ("batch_size", 0), ("noise_std", -1.0)):
        with pytest.raises(ValueError, match=r"must be at least 1|must not be negative"):
            generate(vae_model, denoised_model, **documented | {name: value})


def test_the_other_functions_are_the_methods_of_the_whole_model(loaded, model):
    vae_model, denoised_model, _, config = loaded
    latents = encode(vae_model, IDS)
    assert latents.shape == (2, 4, 32) and torch.equal(latents, model.encode(IDS))
    assert torch.equal(decode(vae_model, latents), model.reconstruct(IDS))
    assert torch.equal(reconstruct(vae_model, IDS, device="cpu"), model.reconstruct(IDS))
    arguments = {"noise_level": 0.5, "num_steps": 6}
    found = denoise_reconstruct(
        vae_model, denoised_model, IDS, **arguments, noise_std=config["noise_std"], device="cpu", generator=seeded()
    )
    assert torch.equal(found, model.denoise_reconstruct(IDS, **arguments, generator=seeded()))
    for other in ({"noise_level": 0.1}, {"num_steps": 1}, {"noise_std": 3.0}):
        given = {"noise_std": config["noise_std"], **arguments, **other}
        assert not torch.equal(found, denoise_reconstruct(vae_model, denoised_model, IDS, **given, generator=seeded()))
    untouched = denoise_reconstruct(vae_model, denoised_model, IDS, noise_level=1.0)
    assert torch.equal(untouched, model.reconstruct(IDS))


FOLDERS = {
    "documented": {}, "context": {"context": SHAPE, "block_size": 1}, "statistics": {"standardize_latents": True},
    "sampler": {"sampler": "heun"}, "times": {"step_power": 2.0}, "steps": {"num_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_model_folder_loads_the_same_way(tmp_path, kind):
    model = small(**FOLDERS[kind], noise_std=1.0)
    model.fit_latents(torch.full((32,), 0.5), torch.full((32,), 2.0))
    model.save_pretrained(tmp_path)
    vae_model, denoised_model, model_args, config = load_checkpoint(tmp_path, device="cpu")
    assert isinstance(denoised_model, DenoisedModel if kind == "documented" else TokComModel)
    assert config == {"tokenizer_path": str(tmp_path), "max_length": 32, "chunk_size": 4, "noise_std": 1.0}
    arguments = {"num_chunks": 4, "chunk_size": 4, "hidden_size": model_args.hidden_size, "num_steps": 3}
    ids = generate(vae_model, denoised_model, **arguments, noise_std=1.0, generator=seeded())
    assert torch.equal(ids, model.generate(num_chunks=4, num_steps=3, generator=seeded()))
    cooler = generate(vae_model, denoised_model, **arguments, noise_std=0.5, generator=seeded())
    if kind == "documented":
        assert not torch.equal(ids, cooler)
    else:
        halved = model.generate(num_chunks=4, num_steps=3, temperature=0.5, generator=seeded())
        assert torch.equal(cooler, halved) and not torch.equal(ids, cooler)
        with pytest.raises(ValueError, match=r"noise_std=0\.5 contradicts the model"):
            denoise_reconstruct(vae_model, denoised_model, IDS, noise_std=0.5)
        with pytest.raises(ValueError, match="not the VAE of denoised_model"):
            generate(small().vae, denoised_model)


def test_a_stage_one_file_has_no_denoiser_and_says_so(tmp_path, model):
    save_checkpoint(tmp_path / "best_vae.pt", model.vae, epoch=1, val_loss=0.1, tokenizer_path="tokens")
    vae_model, denoised_model, _, _ = load_checkpoint(tmp_path / "best_vae.pt")
    assert denoised_model is None and torch.equal(reconstruct(vae_model, IDS), model.reconstruct(IDS))
    with pytest.raises(TypeError, match="with a VAE alone, use encode"):
        generate(vae_model, denoised_model)
    context = small(context=SHAPE, block_size=1)
    with pytest.raises(ValueError, match="needs a context"):
        generate(context.vae, context.denoiser)
