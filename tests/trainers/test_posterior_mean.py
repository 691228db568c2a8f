"""Predicting tokens instead of latents: the mean latent is exact, trains, samples and saves."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tokcom_hf import TokComConfig, TokComModel, TokComVAEConfig
from tokcom_hf.models.flow_matching import lagged_times
from tokcom_hf.trainers.noise_plan import draw_token_times, plan_blocks

sys.path.insert(0, str(Path(__file__).parent))
from test_tokcom_training import SHAPE, Rows, denoiser_trainer, vae_trainer
from test_tokcom_training import joint_model as joint


def tokcom(**flow) -> TokComModel:
    torch.manual_seed(0)
    vae = {"vocab_size": 51, "latent_size": 16, "chunk_projection": "all", "encoder": "embedding", **SHAPE}
    denoiser = {"self_conditioning": True, **SHAPE}
    values = {"standardize_latents": True, "noise_std": 1.0, "clean_prefix": True, "eos_token_id": 0}
    return TokComModel(TokComConfig(vae=vae, denoiser=denoiser, clean_latents="posterior_mean", **values | flow))


def test_the_mean_latent_is_the_mean_of_latents():
    model = tokcom()
    probabilities = torch.randn(3, 4, 51).softmax(-1)
    expected = model.vae.expected_latents(probabilities)
    drawn = torch.stack([torch.multinomial(p, 20000, replacement=True) for p in probabilities], dim=0)
    latents = model.vae.encode(drawn.transpose(1, 2).reshape(3, -1))
    torch.testing.assert_close(latents.mean(1), expected, atol=0.05, rtol=0)
    # Of one certain token per place it is the latent itself, and every token has unit scale but for the norm's epsilon.
    ids = torch.randint(51, (2, 4))
    certain = torch.nn.functional.one_hot(ids, 51).float()
    torch.testing.assert_close(model.vae.expected_latents(certain), model.vae.encode(ids)[:, 0])
    square = model.vae.token_latents.weight[ids].square().mean(-1)
    expected = square / (square + model.config.vae.rms_norm_eps)
    torch.testing.assert_close(model.vae.encode(ids).view(2, 4, -1).square().mean(-1), expected)
    assert bool((expected > 0.98).all())
    # An optimizer step must be able to turn a row: the table starts as small as other weights.
    std = model.vae.token_latents.weight.std()
    torch.testing.assert_close(std, torch.tensor(model.config.vae.initializer_range), atol=0.004, rtol=0)


def test_forward_gives_the_mean_of_its_own_tokens(monkeypatch):
    model = tokcom().eval()
    model.latent_mean.normal_()
    model.latent_std.uniform_(0.5, 2)
    x, t = torch.randn(2, 6, 16), torch.full((2,), 0.4)
    output = model(x, t)
    logits = model.vae.lm_head(output.token_hidden)
    logits[..., 50] = -torch.inf
    expected = model.standardize(model.vae.expected_latents(logits.softmax(-1)))
    torch.testing.assert_close(output.clean_latents, expected)
    monkeypatch.setattr("tokcom_hf.models.modeling_tokcom.LOGITS_AT_ONCE", 300)
    torch.testing.assert_close(model(x, t).clean_latents, expected)
    cold = model.unstandardize(model(x, t, posterior_temperature=1e-6).clean_latents)
    best = model.vae.encode(logits.argmax(-1).flatten(1))
    torch.testing.assert_close(cold, best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mse_weight", [0.0, 1.0])
@pytest.mark.parametrize("independent_times", [False, True])
def test_it_trains(tmp_path, mse_weight, independent_times):
    model = tokcom(mse_weight=mse_weight, independent_times=independent_times)
    with torch.no_grad():
        # The head of a trained VAE can tell tokens apart.
        model.vae.lm_head.weight.normal_(0, 0.3)
    trainer = denoiser_trainer(tmp_path, model, max_steps=60, learning_rate=3e-3)
    # Evaluation draws the same times and noise every time.
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * before
    assert "diffusion/batch_ce_loss" in trainer.state.log_history[1]


def test_times_are_one_per_position_behind_the_prefix():
    config = tokcom(independent_times=True).config
    plans = [plan_blocks(12, config, torch.Generator().manual_seed(i)) for i in range(40)]
    assert {plan.blocks for plan in plans if not plan.clean_first} == {12}
    for plan in (plan for plan in plans if plan.clean_first):
        prefix = int((plan.index == 0).sum())
        assert plan.index.tolist() == [0] * prefix + list(range(1, 13 - prefix)) and plan.blocks == 13 - prefix


def test_the_vae_learns_with_the_linear_encoder(tmp_path):
    vae = tokcom().vae
    trainer = vae_trainer(tmp_path, vae, max_steps=120, learning_rate=1e-2)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_token_accuracy"] > 0.9


def test_generation_reload_and_latents(tmp_path):
    model = tokcom().eval()
    prompt = torch.randint(1, 50, (2, 6))
    options = {"num_generate_chunks": 3, "num_steps": 3}
    draw = lambda m, **more: m.generate(prompt, generator=torch.Generator().manual_seed(1), **options | more)  # noqa: E731
    ids = draw(model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(draw(again), ids) and again.config.denoiser.output_size == 4 * 32
    output = draw(model, return_dict_in_generate=True, block_size=1, posterior_temperature=1e-6)
    assert output.latents.shape == (2, 3, 16) and output.sequences.shape == ids.shape
    # At temperature 0 the mean latent is the latent of the likeliest tokens, which are what was read.
    again = model.encode(output.sequences[:, -12:])
    if not bool((output.sequences == model.config.eos_token_id).any()):
        torch.testing.assert_close(output.latents, again, atol=1e-4, rtol=1e-4)


def test_the_evidence_is_the_density_of_the_noise():
    model = joint().eval()
    model.fit_latents(torch.randn(8).repeat(4), (torch.rand(8) + 0.5).repeat(4))
    with torch.no_grad():
        model.vae.lm_head.weight.zero_()
    x, t = torch.randn(2, 3, 32), torch.tensor([0.3, 0.6])
    logits = torch.nn.functional.linear(model(x, t).token_hidden, model.token_head())
    table = model.standardize(model.vae.token_table().repeat(1, 4))[:, :8]
    mean = t.view(2, 1, 1, 1, 1) * table
    noise = torch.distributions.Normal(mean, (1 - t).view(2, 1, 1, 1, 1))
    density = noise.log_prob(x.view(2, 3, 4, 1, 8)).sum(-1)
    torch.testing.assert_close(logits.softmax(-1), density.softmax(-1), atol=1e-5, rtol=1e-4)


def test_statistics_are_one_for_all_places():
    model, ids = joint(), torch.randint(50, (64, 40))
    latents = model.encode(ids).flatten(0, 1)
    model.fit_latents(latents.mean(0), latents.std(0, unbiased=False))
    pooled = latents.view(-1, 8)
    torch.testing.assert_close(model.latent_mean, pooled.mean(0).repeat(4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.latent_std, pooled.std(0, unbiased=False).repeat(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_tables_head_and_denoiser_train_together(tmp_path, monkeypatch, attention):
    model = joint(denoiser=SHAPE | {"attention": attention})
    frozen = joint(denoiser=SHAPE | {"attention": attention})
    # Of random tokens x_t says all there is to know from the first step on; of these rows the rest of the row says more.
    monkeypatch.setattr(Rows, "__getitem__", lambda rows, index: {
        "input_ids": rows.ids[index, :1].expand(16), "attention_mask": torch.ones(16, dtype=torch.long),
    })  # fmt: skip
    trainer = denoiser_trainer(tmp_path, model, max_steps=200, learning_rate=3e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    for name in ("token_latents.weight", "lm_head.weight"):
        change = model.vae.get_parameter(name) - frozen.vae.get_parameter(name)
        assert change.abs().max() > 1e-3, name
    ids = torch.randint(50, (8, 40))
    # Whatever the table has become, text comes back from its latents.
    assert (model.reconstruct(ids) == ids).float().mean() > 0.9


def test_a_finished_block_is_seen_as_the_latents_of_its_text(monkeypatch):
    model = joint(denoiser=SHAPE | {"attention": "block_causal"}).eval()
    seen = []
    extend = model._extend_cache
    monkeypatch.setattr(model, "_extend_cache", lambda past, x, *rest: (seen.append(x), extend(past, x, *rest))[1])
    ids = model.generate(None, num_chunks=3, num_steps=2, block_size=1, generator=torch.Generator().manual_seed(0))
    expected = model.standardize(model.encode(ids))
    assert len(seen) == 2
    for place, x in enumerate(seen):
        if not bool((ids[:, : 4 * place + 4] == model.config.eos_token_id).any()):
            torch.testing.assert_close(x, expected[:, place : place + 1])


def test_scaled_inputs_are_what_is_expected_of_a_gaussian(monkeypatch):
    model = joint(scale_input=True, noise_std=0.7).eval()
    seen = []
    run = model.denoiser.forward
    monkeypatch.setattr(model.denoiser, "forward", lambda x, *rest, **more: (seen.append(x), run(x, *rest, **more))[1])
    torch.manual_seed(1)
    clean, noise, t = torch.randn(400, 50, 32), 0.7 * torch.randn(400, 50, 32), torch.tensor(0.3)
    model(0.7 * noise + 0.3 * clean, t.expand(400))
    # The best linear estimate: its error is uncorrelated with it.
    assert abs(float(((clean - seen[0]) * seen[0]).mean())) < 2e-3
    model(clean, torch.ones(400))
    torch.testing.assert_close(seen[1], clean)


def test_tokens_have_times_of_their_own(tmp_path):
    model = joint(token_time_std=2.0, scale_input=True)
    trainer = denoiser_trainer(tmp_path, model, max_steps=4)
    chunks = torch.tensor([[0.3, 1.0, 0.6]]).repeat(500, 1)
    own, asked, same = draw_token_times(chunks, model.config, torch.Generator().manual_seed(0))
    assert asked is None and torch.equal(same, chunks)
    assert own.shape == (500, 3, 4) and bool((own[:, 1] == 1).all())
    logits = torch.logit(own[:, [0, 2]].double())
    torch.testing.assert_close(logits.std((0, 2)), torch.full((2,), 2.0, dtype=torch.double), atol=0.1, rtol=0)
    torch.testing.assert_close(logits.mean((0, 2)), torch.logit(torch.tensor([0.3, 0.6]).double()), atol=0.15, rtol=0)
    trainer.train()
    # Equal times are what a time per chunk means.
    x, t = torch.randn(2, 5, 32), torch.tensor([0.2, 0.7])
    model.eval()
    same = model(x, t, token_times=t.view(2, 1, 1).expand(2, 5, 4))
    torch.testing.assert_close(same.token_hidden, model(x, t).token_hidden)


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_lagging_tokens_arrive_too(attention):
    model = joint(token_time_std=2.0, scale_input=True, denoiser=SHAPE | {"attention": attention}).eval()
    prompt = torch.randint(1, 50, (2, 8))
    options = {"num_generate_chunks": 3, "num_steps": 6, "block_size": 2}
    draw = lambda **more: model.generate(prompt, generator=torch.Generator().manual_seed(0), **options | more)  # noqa: E731
    assert torch.equal(draw(token_lag=1e-9), draw())
    assert draw(token_lag=2.0).shape == (2, 20) and draw(token_lag=1.0, sampler="renoise").shape == (2, 20)
    with pytest.raises(ValueError, match="token_lag must be 0"):
        draw(token_lag=1.0, sampler="heun")
    with pytest.raises(ValueError, match="token_lag must be 0"):
        joint().generate(token_lag=1.0)


def test_times_of_lagging_tokens():
    times = lagged_times([0.0, 0.25, 0.5, 0.75, 1.0], 4, 1.0)
    assert times[0].tolist() == [0, 0, 0, 0] and times[-1].tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(times[2], torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))
    assert bool((times.diff(dim=0) >= 0).all()) and bool((times.diff(dim=1) <= 0).all())
    torch.testing.assert_close(lagged_times([0.0, 0.5, 1.0], 4, 0.0), torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 4))


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"set vae\.encoder='embedding'"):
        TokComConfig(vae={"latent_size": 16, **SHAPE}, clean_latents="posterior_mean")
    with pytest.raises(ValueError, match="multiple of 4"):
        TokComVAEConfig(encoder="embedding", latent_size=18, **SHAPE)
    with pytest.raises(ValueError, match="nearest_decoder reads"):
        TokComVAEConfig(nearest_decoder=True, **SHAPE)
    with pytest.raises(ValueError, match="only the nearest-embedding decoder"):
        TokComConfig(vae={"latent_size": 16, **SHAPE}, train_embeddings=True)
    with pytest.raises(ValueError, match="set train_embeddings"):
        joint(train_embeddings=False)
    with pytest.raises(ValueError, match="latents have no logits"):
        TokComConfig(vae={"latent_size": 16, **SHAPE}, noise_likelihood=True)
    with pytest.raises(ValueError, match="latents have no tokens"):
        TokComConfig(vae={"latent_size": 16, **SHAPE}, token_window_size=8)
    with pytest.raises(ValueError, match="token_time_std needs noise_likelihood"):
        joint(noise_likelihood=False, token_time_std=1.0)
    with pytest.raises(ValueError, match="must be positive"):
        tokcom().generate(posterior_temperature=0.0)
    plain = TokComModel(TokComConfig(vae={"vocab_size": 51, "latent_size": 16, **SHAPE}, denoiser=SHAPE))
    with pytest.raises(ValueError, match="belongs to models with clean_latents"):
        plain.generate(posterior_temperature=0.5)


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_a_token_sees_its_window_and_nothing_else(self_conditioning):
    denoiser = SHAPE | {"attention": "block_causal", "self_conditioning": self_conditioning}
    model = joint(token_window_size=24, scale_input=True, denoiser=denoiser).eval()
    window = model.token_window
    for linear in (window.up, model.vae.lm_head):
        torch.testing.assert_close(linear.weight.std().item(), linear.in_features**-0.5, rtol=0.1, atol=0)
    with torch.no_grad():
        model.denoiser.output_proj.weight.zero_()
    clean, x, t = torch.randn(1, 6, 32), torch.randn(1, 6, 32), torch.rand(1, 3)
    index = torch.tensor([0, 0, 1, 1, 2, 2])

    def run(clean, x):
        hidden = model(x, t, context=clean, block_index=index).token_hidden
        return hidden[..., : model.config.vae.hidden_size]

    before = run(clean, x)

    def changed(tensor: str, chunk: int, place: int) -> list[int]:
        values = {"clean": clean.clone(), "x": x.clone()}
        values[tensor].view(1, 6, 4, 8)[0, chunk, place] += 1.0
        differs = (run(**values) - before).abs().amax(-1)[0].flatten() > 1e-6
        return differs.nonzero().flatten().tolist()

    # A noisy token changes itself and the four right of it, within its block.
    assert changed("x", 2, 1) == list(range(9, 14))
    # What follows a block sees the finished chunk instead.
    assert changed("x", 3, 2) == list(range(14, 16))
    assert changed("clean", 3, 2) == list(range(16, 19))
    assert changed("clean", 2, 2) == []


def test_windows_in_generation_are_those_of_training():
    model = joint(token_window_size=24, scale_input=True, denoiser=SHAPE | {"attention": "block_causal"}).eval()
    clean, x, t = torch.randn(2, 6, 32), torch.randn(2, 6, 32), torch.rand(2, 3)
    whole = model(x, t, context=clean, block_index=torch.tensor([0, 0, 1, 1, 2, 2]))
    past = model._extend_cache(model._extend_cache(None, clean[:, :2], None, 0), clean[:, 2:4], None, 2)
    last = model(x[:, 4:], t[:, 2], past_key_values=past, position_offset=4, previous=clean[:, 3:4])
    torch.testing.assert_close(whole.token_hidden[:, 4:], last.token_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.clean_latents[:, 4:], last.clean_latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_windows_of_uneven_prompts_do_not_see_padding(attention, block_size):
    denoiser = SHAPE | {"attention": attention, "self_conditioning": True}
    model = joint(token_window_size=24, scale_input=True, eos_token_id=None, denoiser=denoiser).eval()
    rows = [torch.randint(1, 50, (length,)) for length in (9, 3)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    noise = torch.randn(2, 4, 32)
    settings = {"num_generate_chunks": 4, "num_steps": 3, "block_size": block_size}
    for part in ([0, 1], [0], [1]):
        blocks = iter(noise[part].split(block_size or 4, dim=1))
        model._noise = lambda shape, generator, blocks=blocks: next(blocks)
        drawn = model.generate(ids[part], prompt_mask=mask[part], **settings)
        if len(part) == 2:
            batch = drawn
        else:
            length = len(rows[part[0]])
            assert torch.equal(drawn[0, : length + 16], batch[part[0], : length + 16])
