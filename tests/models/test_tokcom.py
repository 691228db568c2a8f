"""TokCom models: configurations, loading, layers, generation."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.helpers.tokcom_tools import CONTEXT, VAE, inputs, seeded, small
from tokcom_hf import DenoisedModel, DenoisedModelConfig, TokComConfig, TokComModel, TokComVAE, TokComVAEConfig

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip
KINDS = ("tokcom", "context", "posterior")


def tiny_model(kind: str = "tokcom", **changes) -> TokComModel:
    """With statistics of its latents; without a context a prompt stays clean, as it is trained."""
    own = {"clean_prefix": True} if kind == "tokcom" else {}
    vae = VAE | {"fixed_norm": True, "chunk_projection": "all"}
    return small(kind, **{"vae": vae, "standardize_latents": True, "eos_token_id": 0} | own | changes)


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
    assert (denoiser.time_scale, denoiser.self_conditioning) == (1.0, False)
    assert (flow.context, flow.block_size, flow.num_steps, flow.step_power, flow.sampler) == (None, 0, 50, 1, "euler")
    assert (flow.standardize_latents, flow.clean_prefix, flow.noise_draws, flow.context_dropout) == (
        False,
        False,
        1,
        0,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: TokComVAEConfig(hidden_size=30), "multiple of num_attention_heads"),
        (lambda: TokComVAEConfig(num_attention_heads=14, num_key_value_heads=3), "multiple of num_key_value_heads"),
        (lambda: TokComVAEConfig(vocab_size=10, omni_token_id=10), "row of the embedding"),
        (lambda: TokComVAEConfig(token_dropout=1.0), "token_dropout"),
        (lambda: TokComConfig(vae={"latent_size": 8}, denoiser={"latent_size": 9}), "latent_size must be 8"),
        (lambda: TokComConfig(denoiser={"context_size": 9}), "context_size must be None"),
        (lambda: TokComConfig(context=CONTEXT, denoiser={"context_size": 9}), "context_size must be 48"),
        (
            lambda: TokComConfig(context=CONTEXT | {"vocab_size": 9}),
            "context.vocab_size must be the VAE's 32017, got 9",
        ),
        (lambda: TokComConfig(context=CONTEXT, clean_prefix=True), "clean_prefix is for models without a context"),
        (lambda: TokComConfig(context=CONTEXT, block_sizes=[]), "at least one size"),
        (lambda: TokComConfig(context=CONTEXT, block_sizes=[2, -1]), "none may be negative"),
        (lambda: TokComConfig(context=CONTEXT, block_size=-1), "none may be negative"),
        (lambda: TokComConfig(context=CONTEXT, context_dropout=1.0), r"context_dropout must be in \[0, 1\)"),
        (lambda: TokComConfig(block_sizes=[1, 2]), "the whole row is one block"),
        (lambda: TokComConfig(block_size=2), "the whole row is one block"),
        (lambda: TokComConfig(noise_draws=2), "the whole row is one block"),
        (lambda: TokComConfig(noise_draws=0.5), "the whole row is one block"),
        (lambda: TokComConfig(context_dropout=0.1), "the whole row is one block"),
        (
            lambda: TokComConfig(sampler="commit"),
            "sampler must be one of euler, heun, multistep, multirate, renoise, got 'commit'",
        ),
        (lambda: TokComConfig(num_steps=0), "must be at least 1"),
        (lambda: TokComConfig(max_chunks=0), "must be at least 1"),
        (lambda: TokComConfig(context=CONTEXT, noise_draws=0), "a whole number or 1 divided by one, got 0"),
        (lambda: TokComConfig(context=CONTEXT, noise_draws=1.5), "a whole number or 1 divided by one, got 1.5"),
        (lambda: TokComConfig(context=CONTEXT, noise_draws=0.3), "a whole number or 1 divided by one, got 0.3"),
        (lambda: TokComConfig(context=CONTEXT, told_weight=0.5), "told_weight=0.5 needs token_posterior=True"),
        (
            lambda: TokComConfig(context=CONTEXT, told_weight=-0.1, token_posterior=True),
            "told_weight must be at least 0, got -0.1",
        ),
        (lambda: TokComConfig(step_quantiles=True), "step_quantiles needs time_distribution='logit_normal'"),
        (lambda: TokComConfig(step_quantiles=True, time_distribution="logit_normal", step_power=2), "no meaning"),
    ],
)
def test_bad_configurations_say_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_wrong_types_raise():
    with pytest.raises(Exception, match="hidden_size"):
        TokComVAEConfig(hidden_size="wide")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_the_meta_device(tmp_path, kind):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, TokComModel)
    stored = AutoConfig.from_pretrained(tmp_path)
    for part in ("vae", "denoiser") if kind == "tokcom" else ("vae", "denoiser", "context"):
        one, other = (
            {k: v for k, v in getattr(config, part).to_dict().items() if k != "dtype"}
            for config in (stored, model.config)
        )
        assert one == other
    assert (stored.context is None) == (kind == "tokcom")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.vae.lm_head.weight is loaded.vae.embed_tokens.weight
    torch.testing.assert_close(loaded(**inputs(kind)).loss, model(**inputs(kind)).loss, atol=1e-5, rtol=1e-5)


def test_missing_statistics_come_back_as_identity(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["latent_mean"], tensors["latent_std"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = TokComModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.latent_mean, torch.zeros(16))
    assert torch.equal(loaded.latent_std, torch.ones(16))


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_device_map_and_attention_implementations_agree(tmp_path, kind):
    tiny_model(kind).save_pretrained(tmp_path)
    ids = torch.randint(1, 50, (2, 8))
    sdpa = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa", device_map="cpu").eval()
    eager = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for part in ("vae", "denoiser") if kind == "tokcom" else ("vae", "denoiser", "context"):
        assert getattr(sdpa.config, part)._attn_implementation == "sdpa"
        assert getattr(eager.config, part)._attn_implementation == "eager"
    torch.testing.assert_close(sdpa.vae(ids).logits, eager.vae(ids).logits, atol=1e-5, rtol=1e-5)
    x, t = torch.randn(2, 5, sdpa.config.denoiser.latent_size), torch.rand(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    one, two = (model.denoiser(x, t, attention_mask=mask).clean_latents for model in (sdpa, eager))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    one, two = (model(**inputs(kind), attention_mask=mask).loss for model in (sdpa, eager))
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


def test_a_new_denoiser_ignores_time_and_context_and_a_trained_one_does_not():
    x, context = torch.randn(1, 4, 16), torch.randn(1, 48)
    fresh = DenoisedModel(DenoisedModelConfig(latent_size=16, context_size=48, **SHAPE)).eval()
    early, late, told = (
        fresh(x, torch.tensor([t]), context=c).clean_latents for t, c in ((0.1, None), (0.9, None), (0.1, context))
    )
    assert torch.equal(early, late) and torch.equal(early, told)
    model = small("denoiser", context_size=48)
    early, late, told, other = (
        model(x, torch.tensor([t]), context=c).clean_latents
        for t, c in ((0.1, None), (0.9, None), (0.1, context), (0.1, -context))
    )
    assert not any(torch.allclose(early, one) for one in (late, told, other)) and not torch.allclose(told, other)


def test_with_a_context_equal_chunks_differ_by_their_place():
    alone, x = torch.zeros(1, 48), torch.randn(1, 1, 16).expand(1, 3, 16)
    # Attention over equal chunks is the same everywhere, because values carry no position.
    documented = small("denoiser")(x, torch.tensor([0.5])).clean_latents[0]
    torch.testing.assert_close(documented[0], documented[2], atol=1e-5, rtol=1e-5)
    placed = small("denoiser", context_size=48)(x, torch.tensor([0.5]), context=alone).clean_latents[0]
    assert not torch.allclose(placed[0], placed[2], atol=1e-3)


def test_time_per_position_equals_one_time_where_they_are_equal():
    model, x = small("denoiser"), torch.randn(2, 6, 16)
    t = torch.tensor([0.2, 0.7])
    expected = model(x, t).clean_latents
    torch.testing.assert_close(model(x, t[:, None].expand(2, 6)).clean_latents, expected)
    same = model(x, torch.tensor([0.2])).clean_latents
    torch.testing.assert_close(same[0], expected[0])
    assert not torch.allclose(same[1], expected[1])


def test_what_a_denoiser_cannot_use_is_refused():
    x, t = torch.randn(2, 6, 16), torch.rand(2)
    plain, told = small("denoiser"), small("denoiser", context_size=48)
    for call, message in (
        (lambda: plain(x, torch.rand(2, 4)), "timesteps must be"),
        (lambda: plain(x, torch.rand(3)), "timesteps must be"),
        (lambda: plain(x, t, context=torch.randn(2, 48)), "with context_size=None leave it out"),
        (lambda: told(x, t, context=torch.randn(2, 47)), r"\(batch, context_size\) = \(2, 48\), got \(2, 47\)"),
        (lambda: told(x, t, context=torch.randn(1, 48)), r"= \(2, 48\), got \(1, 48\)"),
        (lambda: plain(x, t, self_condition=x), "self_conditioning=True; leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_earlier_prediction_is_an_input_and_zeros_where_it_is_missing():
    model, x, t = small("denoiser", self_conditioning=True), torch.randn(2, 6, 16), torch.rand(2)
    plain = model(x, t).clean_latents
    assert torch.equal(plain, model(x, t, self_condition=torch.zeros_like(x)).clean_latents)
    assert not torch.allclose(plain, model(x, t, self_condition=x).clean_latents)


def test_masked_chunks_are_not_seen_by_the_others():
    model, x, t = small("denoiser"), torch.randn(2, 6, 16), torch.rand(2)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 0]])
    before = model(x, t, attention_mask=mask).clean_latents
    other = x.clone()
    other[1, [2, 5]] = 9.0
    after = model(other, t, attention_mask=mask).clean_latents
    assert torch.equal(before[0], after[0]) and torch.equal(before[1, [0, 1, 3, 4]], after[1, [0, 1, 3, 4]])
    assert not torch.allclose(model(x, t).clean_latents[1], before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels(kind):
    model, ids = tiny_model(kind), torch.randint(1, 50, (2, 16))
    assert torch.equal(model.denoise_reconstruct(ids, noise_level=1.0), model.reconstruct(ids))
    for level in (-0.1, 1.1):
        with pytest.raises(ValueError, match="noise_level in"):
            model.denoise_reconstruct(ids, noise_level=level)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        model.denoise_reconstruct(ids, num_steps=0)
    for level in (0.5, 1.0):
        with pytest.raises(ValueError, match="sampler must be one of"):
            model.denoise_reconstruct(ids, noise_level=level, sampler="magic")
    draw = lambda seed, **more: model.denoise_reconstruct(ids, 0.1, 10, generator=seeded(seed), **more)  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).shape == ids.shape and not torch.equal(draw(1), draw(1, sampler="heun"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "level", "passes"), [(50, 0.9, 5), (50, 0.5, 25), (3, 0.9, 1)])
def test_the_documented_number_of_steps_from_a_noise_level(kind, steps, level, passes):
    model, seen = tiny_model(kind), []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), args[1].item())))
    model.denoise_reconstruct(torch.randint(1, 50, (2, 16)), level, steps)
    # Blocks of two chunks of 16 tokens behind their context, or rows of four chunks.
    assert [rows for rows, _ in seen] == [2 if kind == "tokcom" else 4] * passes
    assert seen[0][1] == pytest.approx(level)


def test_blocks_are_denoised_behind_the_tokens_that_precede_them():
    model, ids = tiny_model("context"), torch.randint(1, 50, (1, 16), generator=seeded())
    states, given = model.context(ids), []
    model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["context"]), with_kwargs=True
    )
    model.denoise_reconstruct(ids, 0.5, 2)
    torch.testing.assert_close(given[0], states[0, [0, 8]])


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
