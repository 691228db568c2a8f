"""TokCom models: configurations, loading, layers, generation."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tokcom_hf import DenoisedModel, DenoisedModelConfig, TokComConfig, TokComModel, TokComVAE, TokComVAEConfig

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip


def tiny_config(attention: str = "bidirectional", **changes) -> TokComConfig:
    vae = {"vocab_size": 51, "latent_size": 16, "fixed_norm": True, **SHAPE}
    denoiser = {"attention": attention, "self_conditioning": changes.pop("self_conditioning", False), **SHAPE}
    defaults = {"standardize_latents": True, "noise_std": 1.0, "clean_prefix": True, "eos_token_id": 0}
    return TokComConfig(vae=vae, denoiser=denoiser, **defaults | changes)


def tiny_model(attention: str = "bidirectional", **changes) -> TokComModel:
    """Random weights large enough that every input matters (adaLN-Zero would hide the time)."""
    torch.manual_seed(0)
    model = TokComModel(tiny_config(attention, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        model.latent_mean.normal_()
        model.latent_std.uniform_(0.5, 2.0)
    return model


def test_defaults_are_the_documented_numbers():
    vae, denoiser, flow = TokComVAEConfig(), DenoisedModelConfig(), TokComConfig()
    for config in (vae, denoiser):
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (896, 24, 14)
        assert (config.num_key_value_heads, config.intermediate_size) == (2, 4864)
        assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 1e6)
    assert (vae.chunk_size, vae.latent_size, vae.omni_token_id) == (4, 896, vae.vocab_size - 1)
    assert (flow.noise_std, flow.time_distribution, flow.mse_weight, flow.cross_entropy_weight) == (
        0.05,
        "uniform",
        0,
        1,
    )
    assert (denoiser.time_scale, denoiser.time_max_period, denoiser.self_conditioning) == (1.0, 10000.0, False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: TokComVAEConfig(hidden_size=30), "multiple of num_attention_heads"),
        (lambda: TokComVAEConfig(num_attention_heads=14, num_key_value_heads=3), "multiple of num_key_value_heads"),
        (lambda: TokComVAEConfig(vocab_size=10, omni_token_id=10), "row of the embedding"),
        (lambda: TokComVAEConfig(token_dropout=1.0), "token_dropout"),
        (lambda: TokComConfig(vae={"latent_size": 8}, denoiser={"latent_size": 9}), "agree on latent_size"),
    ],
)
def test_bad_configurations_say_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_wrong_types_raise():
    with pytest.raises(Exception, match="hidden_size"):
        TokComVAEConfig(hidden_size="wide")


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_round_trip_through_the_meta_device(tmp_path, attention):
    model = tiny_model(attention)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, TokComModel)
    for part, fields in (("vae", model.config.vae), ("denoiser", model.config.denoiser)):
        stored = getattr(AutoConfig.from_pretrained(tmp_path), part).to_dict()
        assert {k: v for k, v in stored.items() if k != "dtype"} == {
            k: v for k, v in fields.to_dict().items() if k != "dtype"
        }
    assert loaded.config.denoiser.attention == attention
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.vae.lm_head.weight is loaded.vae.embed_tokens.weight


def test_missing_statistics_come_back_as_identity(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["latent_mean"], tensors["latent_std"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = TokComModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.latent_mean, torch.zeros(16))
    assert torch.equal(loaded.latent_std, torch.ones(16))


def test_dtype_device_map_and_attention_implementations_agree(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ids = torch.randint(1, 50, (2, 8))
    sdpa = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa", device_map="cpu").eval()
    eager = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert sdpa.vae.config._attn_implementation == "sdpa" and eager.vae.config._attn_implementation == "eager"
    torch.testing.assert_close(sdpa.vae(ids).logits, eager.vae(ids).logits, atol=1e-5, rtol=1e-5)
    x, t = torch.randn(2, 5, 16), torch.rand(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    one, two = (model(x, t, attention_mask=mask).clean_latents for model in (sdpa, eager))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.vae.lm_head.weight.dtype == torch.bfloat16
    assert half.generate(num_chunks=2, num_steps=2).shape == (1, 8)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = TokComVAE(TokComVAEConfig(vocab_size=51, **SHAPE)).train()
    ids = torch.randint(0, 50, (4, 4))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.encoder.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_vae_loss_is_the_cross_entropy_of_its_logits_and_ignores_padding():
    vae = TokComVAE(TokComVAEConfig(vocab_size=51, **SHAPE)).eval()
    ids = torch.randint(0, 50, (2, 12))
    labels = ids.clone()
    labels[1, 7:] = -100
    output = vae(ids, labels=labels, return_logits=True)
    assert output.logits.shape == (6, 4, 51) and output.latents.shape == (6, 32)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_each_chunk_is_encoded_on_its_own():
    vae = TokComVAE(TokComVAEConfig(vocab_size=51, **SHAPE)).eval()
    ids = torch.randint(0, 50, (1, 12))
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 50
    first, second = vae.encode(ids), vae.encode(other)
    torch.testing.assert_close(first[:, [0, 2]], second[:, [0, 2]])
    assert not torch.allclose(first[:, 1], second[:, 1])


def test_decoding_never_writes_the_omni_token():
    model = tiny_model()
    model.vae.embed_tokens.weight.data[50] *= 50
    assert (model.decode(torch.randn(4, 20, 16)) != 50).all()


def test_length_must_be_whole_chunks():
    with pytest.raises(ValueError, match="multiple of chunk_size=4, got 7"):
        tiny_model().encode(torch.ones(1, 7, dtype=torch.long))


def test_a_new_denoiser_ignores_time_and_a_trained_one_does_not():
    x = torch.randn(1, 4, 16)
    for fresh in (DenoisedModel(DenoisedModelConfig(latent_size=16, **SHAPE)), TokComModel(tiny_config())):
        early, late = (fresh.eval()(x, torch.tensor([t])).clean_latents for t in (0.1, 0.9))
        assert torch.equal(early, late)
    model = tiny_model().denoiser
    assert not torch.allclose(model(x, torch.tensor([0.1])).clean_latents, model(x, torch.tensor([0.9])).clean_latents)


def test_time_per_position_equals_one_time_where_they_are_equal():
    model, x = tiny_model(), torch.randn(2, 6, 16)
    t = torch.tensor([0.2, 0.7])
    expected = model(x, t).clean_latents
    embedded: list[int] = []
    model.denoiser.time_mlp.register_forward_pre_hook(lambda module, inputs: embedded.append(len(inputs[0])))
    torch.testing.assert_close(model(x, t[:, None].expand(2, 6)).clean_latents, expected)
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(model(x, t[:, None].expand(2, 2), block_index=index).clean_latents, expected)
    assert embedded == [2, 2], "a time is embedded once, however many positions have it"
    with pytest.raises(ValueError, match="timesteps must be"):
        model(x, torch.rand(2, 4))


def test_generation_embeds_each_time_once_for_all_blocks(monkeypatch):
    model = tiny_model("block_causal")
    embedded: list[float] = []
    hook = model.denoiser.time_mlp.register_forward_pre_hook(
        lambda module, inputs: embedded.append(float(inputs[0][0, 1]))
    )
    settings = {"num_chunks": 6, "num_steps": 3, "block_size": 2}
    # A finished block is read at t = 1, once each.
    ids = model.generate(**settings, generator=torch.Generator().manual_seed(1))
    assert len(embedded) == 3 + 2 and len(set(embedded)) == 4
    hook.remove()
    forward = model.denoiser.forward
    monkeypatch.setattr(model.denoiser, "forward", lambda *a, modulations=None, **k: forward(*a, **k))
    assert torch.equal(model.generate(**settings, generator=torch.Generator().manual_seed(1)), ids)


def test_cached_blocks_equal_the_training_layout():
    model = tiny_model("block_causal")
    clean, x = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    index, t = torch.tensor([0, 0, 1, 1, 2, 2]), torch.rand(2, 3)
    whole = model(x, t, context=clean, block_index=index).clean_latents
    past = model._extend_cache(None, clean[:, :2], None, 0)
    past = model._extend_cache(past, clean[:, 2:4], None, 2)
    last = model(x[:, 4:], t[:, 2], past_key_values=past, position_offset=4).clean_latents
    torch.testing.assert_close(whole[:, 4:], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("block_size", [None, 1, 3])
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_a_batch_of_uneven_prompts_equals_its_rows(attention, block_size, self_conditioning):
    model = tiny_model(attention, self_conditioning=self_conditioning, eos_token_id=None)
    rows = [torch.randint(1, 50, (length,)) for length in (7, 2, 4)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    settings = {"num_generate_chunks": 5, "num_steps": 3, "block_size": block_size}
    noise = iter(torch.randn(50, 3, 5, 16).unbind())
    batch_noise, used = [], []

    def recorded(shape, generator):
        value = next(noise)[: shape[0], : shape[1]] if shape[1] else torch.zeros(shape)
        batch_noise.append(value)
        return value

    model._noise = recorded
    batch = model.generate(ids, prompt_mask=mask, **settings)
    for index, row in enumerate(rows):
        used = iter(batch_noise)
        model._noise = lambda shape, generator, used=used, index=index: next(used)[index : index + 1]
        single = model.generate(row[None], **settings)
        assert torch.equal(single[0], batch[index, : len(row) + 20]), index
        assert torch.equal(batch[index, : len(row)], row)


def test_generation_is_reproducible_and_depends_on_the_seed():
    model = tiny_model()
    one, again, other = (
        model.generate(num_chunks=8, num_steps=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_eos_ends_a_sequence():
    model = tiny_model(eos_token_id=7)
    ids = model.generate(num_chunks=40, num_steps=2, batch_size=3, temperature=5.0)
    assert (ids == 7).any()
    for row in ids:
        first = (row == 7).nonzero()
        assert len(first) == 0 or (row[first[0, 0] :] == 7).all()


def test_full_noise_level_is_plain_reconstruction_and_zero_steps_are_refused():
    model, ids = tiny_model(), torch.randint(1, 50, (2, 8))
    assert torch.equal(model.denoise_reconstruct(ids, noise_level=1.0), model.reconstruct(ids))
    for level in (-0.1, 1.1):
        with pytest.raises(ValueError, match="noise_level must be in"):
            model.denoise_reconstruct(ids, noise_level=level)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        model.generate(num_steps=0)
    with pytest.raises(ValueError, match="at least 1, got -3"):
        model.generate(num_chunks=-3)
    with pytest.raises(ValueError, match="prompt_ids must be in 0 … 50"):
        model.generate(torch.tensor([[3, 77]]))


def test_guidance_scale_one_is_off_and_others_change_the_output():
    model = tiny_model(eos_token_id=None)
    prompt = torch.randint(1, 50, (1, 8))

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        return model.generate(prompt, num_generate_chunks=6, num_steps=4, guidance_scale=scale, generator=generator)

    assert torch.equal(run(1.0), run(1.0)) and not torch.equal(run(1.0), run(4.0))


def test_parameter_counts_at_the_documented_size():
    """24 layers of 896: counted by hand from the documented shapes, built on the meta device."""
    with torch.device("meta"):
        model = TokComModel(TokComConfig())
    size, kv, mlp = 896, 128, 4864
    attention = 2 * size * size + 2 * size * kv + size + 2 * kv
    block = attention + 3 * size * mlp + 2 * size
    vae = 32017 * size + 2 * (24 * block + size)
    adaptive = block + 2 * (2 * size * size + 2 * size)
    time = size * 4 * size + 4 * size + 4 * size * size + size
    denoiser = 24 * adaptive + size + time + size * size + size
    assert sum(p.numel() for p in model.vae.parameters()) == vae
    assert sum(p.numel() for p in model.denoiser.parameters()) == denoiser
