"""`TokenPosterior`: its formulas, its parts in memory, its fit, and what training of it does."""

import copy
import math

import pytest
import torch

from tests.helpers.tokcom_evidence import TEXT, evidence, text_before
from tests.helpers.tokcom_tools import CONTEXT, seeded, small
from tokcom_hf import TokComConfig
from tokcom_hf.models import tokcom_linear_latents, tokcom_token_posterior
from tokcom_hf.models.tokcom_denoise import Denoised, Predictions, denoise
from tokcom_hf.models.tokcom_flow_matching import quantile_times, sample
from tokcom_hf.models.tokcom_token_order import TokenOrder

LOSSES = {
    "mse_weight": 0.7, "cross_entropy_weight": 0.3, "noise_draws": 2, "standardize_latents": True, "recent_size": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small("posterior", **LOSSES)


@pytest.fixture
def call(model):
    """Three blocks of two chunks: noisy latents, times, text before."""
    generator = seeded(3)
    return [
        torch.randn(3, 2, 16, generator=generator),
        torch.rand(3, generator=generator),
        text_before(model),
    ]


def posterior(model, x, t, text) -> torch.Tensor:
    """Posteriors (tokens, vocab) of one block, (chunks, latent), by the formulas of the file."""
    c = model.context(text[None])[0, -1]
    parts, table = model.posterior, model.context.model.embed_tokens.weight
    likelihood = evidence(model, x, t)
    prior = torch.zeros(len(likelihood), 48)
    prior[:4] = (model.context.heads.weight @ c).view(4, 48)
    guess = (likelihood + prior @ table.T).softmax(-1) @ table
    # The denoiser reads at each token the guess before it.
    read = parts.read(guess / table.square().mean().sqrt())
    inputs = prior + torch.cat([torch.zeros(1, 48), read[:-1]])
    states = prior + model.denoiser(inputs[None], t[None], c[None]).clean_latents[0]
    return (likelihood + states @ table.T).softmax(-1)


@torch.no_grad()
def test_the_prediction_is_the_expected_latent_of_the_posterior(model, call):
    labels = torch.randint(0, 50, (3, 2, 4), generator=seeded(5))
    labels[1, 1, 2:] = -100
    found = denoise(model, *call, labels=labels)
    nats = []
    for row, (x, t, text) in enumerate(zip(*call[:2], TEXT)):
        p = posterior(model, x, t, text)
        assert (p[:, 50] == 0).all() and p.sum(-1) == pytest.approx(1.0)
        mean = (p @ model.vae.embed_tokens.weight).view(2, 4, -1)
        torch.testing.assert_close(found.clean_latents[row], model.posterior.write(mean), atol=1e-4, rtol=1e-3)
        nats += [-p[i, token].log() for i, token in enumerate(labels[row].flatten()) if token >= 0]
    torch.testing.assert_close(found.cross_entropy, torch.stack(nats).mean(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_evidence_it_is_the_heads_prediction(call):
    """At t = 0, with a denoiser that says nothing, the first chunk's posterior is the softmax of the heads."""
    model = small("posterior", recent_size=0)
    model.denoiser.output_proj.weight.zero_()
    model.denoiser.output_proj.bias.zero_()
    x, _, before = call
    clean = denoise(model, x, torch.zeros(3), before).clean_latents[:, :1]
    p = model.context.head_logits(before).softmax(-1)
    expected = model.posterior.write(p @ model.vae.embed_tokens.weight)[:, None]
    torch.testing.assert_close(clean, expected)


@torch.no_grad()
def test_the_denoiser_reads_from_left_to_right(model, call):
    """The states of a token depend on what stands before it in its block, and on nothing at or behind it."""
    x, _, before = call
    t, places = torch.full((3,), 0.3), torch.arange(8)
    one = denoise(model, x, t, before).states
    changed = x.clone()
    changed[:, 1] += 1.0
    difference = (denoise(model, changed, t, before).states - one).abs().amax(dim=(0, 2))
    # The second chunk's latents are evidence of its tokens alone, which its first token does not read.
    assert (difference[places <= 4] == 0).all() and (difference[places > 4] > 1e-3).all()


@torch.no_grad()
def test_at_the_noise_the_heads_predict_the_first_chunk_alone(model, call):
    x, _, before = call
    scores = model.context.head_states(before) @ model.context.model.embed_tokens.weight.T
    scores[..., 50] = -torch.inf
    heads = model.posterior.write(scores.softmax(-1) @ model.vae.embed_tokens.weight)[:, None]
    changed = copy.deepcopy(model)
    changed.config.heads_first = True
    with_heads, without = (denoise(each, x, torch.zeros(3), before).clean_latents for each in (changed, model))
    torch.testing.assert_close(with_heads[:, :1], heads)
    torch.testing.assert_close(denoise(changed, x[:, :1], torch.zeros(1), before).clean_latents, heads)
    assert not torch.allclose(without[:, :1], heads, atol=1e-2)
    # The heads tell nothing of later chunks, of other times, nor of a hidden text.
    torch.testing.assert_close(with_heads[:, 1:], without[:, 1:])
    hidden = before * torch.tensor([[1.0], [0.0], [1.0]])
    for t, text in ((0.1, before), (0.0, None), (0.0, hidden)):
        one, two = (denoise(each, x, torch.full((3,), t), text).clean_latents for each in (changed, model))
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_between_two_calls_the_states_go_on_as_they_went(model, call):
    x, _, before = call
    found = []

    def predict(x, t, earlier):
        found.append(denoise(model, x, torch.full((1,), t), before))
        return found[-1]

    predictions = Predictions(model, predict)
    clean = predictions(x, 0.2)
    # With one call its states stay, so that at its own x_t and t they give its own latents.
    torch.testing.assert_close(predictions.between(x, 0.2), clean)
    predictions(x + 0.1, 0.3)
    one, two = (denoised.states for denoised in found)
    logit = {t: math.log(t / (1 - t)) for t in (0.2, 0.3, 0.4)}
    states = two + (two - one) * (logit[0.4] - logit[0.3]) / (logit[0.3] - logit[0.2])
    y = torch.randn(3, 2, 16, generator=seeded(9))
    likelihood = torch.cat([evidence(model, chunks, 0.4) for chunks in y])
    p = (likelihood + states.flatten(0, 1) @ model.context.model.embed_tokens.weight.T).softmax(-1)
    expected = model.posterior.write((p @ model.vae.embed_tokens.weight).view(6, 4, -1)).view(3, 2, -1)
    torch.testing.assert_close(predictions.between(y, 0.4), expected, atol=1e-4, rtol=1e-3)
    # Nothing goes on from t = 0, where log(t / (1 − t)) is infinite.
    start = Predictions(model, predict)
    start(x, 0.0)
    clean = start(x, 0.2)
    torch.testing.assert_close(start.between(x, 0.2), clean)
    assert len(found) == 4


@torch.no_grad()
def test_multirate_calls_the_denoiser_once_per_step_and_comes_near_many_steps(model):
    """With states that do not depend on x_t and t, what it follows is the evidence, for which it needs no calls."""
    model = copy.deepcopy(model)
    model.denoiser.output_proj.weight.zero_()
    model.denoiser.output_proj.bias.zero_()
    before, x, calls = text_before(model), torch.randn(3, 1, 16, generator=seeded(2)), []

    def predict(x, t, earlier):
        calls.append(t)
        return denoise(model, x, torch.full((1,), t), before)

    def end(steps: int, sampler: str) -> torch.Tensor:
        return sample(Predictions(model, predict), x, quantile_times(steps, -0.5, 1.0), sampler)

    exact, errors = end(200, "multistep"), {}
    for sampler in ("multistep", "multirate"):
        calls.clear()
        errors[sampler] = (end(4, sampler) - exact).square().mean()
        assert calls == quantile_times(4, -0.5, 1.0)[:-1]
    assert errors["multirate"] < errors["multistep"] / 4


@torch.no_grad()
def test_the_evidence_follows_the_embedding(model, call):
    changed = copy.deepcopy(model)
    denoise(changed, *call)  # keeps what it computes of the embedding
    changed.vae.embed_tokens.weight[:25] *= 1.5
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(changed.state_dict())
    found, wanted = (denoise(each, *call).clean_latents for each in (changed, fresh))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, denoise(model, *call).clean_latents, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_generation_keeps_changes_nothing(model, call, chunks, monkeypatch):
    monkeypatch.setattr(tokcom_linear_latents, "MOST_KEPT", 4)
    model = copy.deepcopy(model).eval()
    x, before = call[0][:, :chunks], text_before(model)
    for step in (0, 1, 2, 3, 4, 5, 0, 1, 2):
        if step % 2:
            before = torch.randn(3, 48, generator=seeded(step))
        elif step == 2:
            before.mul_(0.5)
        elif step == 4:
            # Of another VAE and other heads, what was kept of the former ones no longer holds.
            model.vae.embed_tokens.weight.mul_(0.8)
            model.context.heads.weight.mul_(0.5)
        t = torch.tensor([step / 6])
        found = [denoise(model.train(mode), x, t, before).clean_latents for mode in (True, False)]
        found += [denoise(model, x, times, before).clean_latents for times in (t, t.repeat(3))]
        for one in found[1:]:
            torch.testing.assert_close(one, found[0], atol=1e-5, rtol=1e-4)
        assert 0 < len(model.posterior._kept) <= 4


def test_parts_of_the_logits_give_the_same_prediction_and_gradients(model, call, monkeypatch):
    labels, found = torch.randint(0, 50, (3, 2, 4), generator=seeded(5)), []
    parameters = [*model.context.parameters(), *model.denoiser.parameters(), *model.posterior.parameters()]
    for at_once in (2**25, 51 * 4 * 2):
        monkeypatch.setattr(tokcom_token_posterior, "LOGITS_AT_ONCE", at_once)
        output = denoise(model, *call, labels=labels)
        loss = output.cross_entropy + output.clean_latents.square().mean()
        found.append([output.clean_latents, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for one, two in zip(*found):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    # The context's layers are behind its state; all else takes part.
    assert all(
        grad is not None and grad.abs().max() > 0 for grad in found[0][-len(list(model.posterior.parameters())) :]
    )


@torch.no_grad()
def test_fit_is_the_nearest_linear_function_of_the_embeddings_and_what_it_leaves():
    model = small("posterior", standardize_latents=True)
    chunks = torch.randint(0, 50, (4000, 4), generator=seeded(7))
    model.posterior.fit(model, chunks)
    parts, embeddings = model.posterior, model.vae.embed_tokens(chunks)
    wanted = model.standardize(model.encode(chunks))[:, 0]
    rest = model.posterior.write(embeddings) - wanted
    assert rest.mean(0).abs().max() < 1e-2 * wanted.std()
    assert rest.var() < 0.9 * wanted.var()
    # No other linear function is better: what is left is uncorrelated with the embeddings.
    embeddings = embeddings.flatten(1)
    correlated = (embeddings - embeddings.mean(0)).T @ rest / len(rest)
    assert correlated.abs().max() < 1e-2 * embeddings.std() * wanted.std()
    # What is left beside one place of a chunk has the covariance that the evidence of its token takes for noise.
    for place in range(4):
        rotation, tokens = parts.rotation[place], model.vae.embed_tokens(chunks[:, place])
        left = wanted - parts.center - (tokens - parts.mean) @ (rotation @ parts.directions[place]).T
        covariance = rotation @ parts.variance[place].diag() @ rotation.T
        assert (torch.cov(left.T) - covariance).norm() < 0.1 * covariance.norm()


@torch.no_grad()
def test_an_order_of_the_tokens_scales_what_carries_each():
    """One model with an order and one without: the same latents in two spaces, with evidence that comes in turn."""
    plain, ordered = (small("posterior", standardize_latents=True, token_order=order) for order in (0.0, 0.7))
    ordered.load_state_dict(plain.state_dict(), strict=False)
    chunks = torch.randint(0, 50, (4000, 4), generator=seeded(7))
    for model in (plain, ordered):
        model.posterior.fit(model, chunks)
    again = copy.deepcopy(ordered.order)
    ordered.posterior.fit(ordered, chunks)
    torch.testing.assert_close(ordered.order.state_dict(), again.state_dict())
    latents = ordered.encode(chunks[:100])
    torch.testing.assert_close(ordered.unstandardize(ordered.standardize(latents)), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ordered.standardize(latents), plain.standardize(latents) @ ordered.order.scale.T)
    # The expected latents are the same ones.
    embeddings = ordered.vae.embed_tokens(chunks[:100])
    one, two = (model.unstandardize(model.posterior.write(embeddings)[:, None]) for model in (plain, ordered))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    # In whitened latents, the map is the harmonic mean of the scales, weighed by what each token carries.
    parts = plain.posterior.rotation @ plain.posterior.directions
    covariances = parts @ torch.cov(plain.vae.embed_tokens(chunks).flatten(0, 1).T, correction=0) @ parts.mT
    scales = torch.exp(0.7 * torch.tensor([1.5, 0.5, -0.5, -1.5]))
    values = torch.linalg.eigvals(ordered.order.scale).real
    assert scales[-1] - 1e-3 <= values.min() and values.max() <= scales[0] + 1e-3
    rest = plain.standardize(plain.encode(chunks))[:, 0] - plain.posterior.write(plain.vae.embed_tokens(chunks))
    total = covariances.sum(dim=0) + rest.T @ rest / len(rest)
    wanted = total + ((1 / scales - 1)[:, None, None] * covariances).sum(dim=0)
    torch.testing.assert_close(ordered.order.inverse @ total, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-2)
    torch.testing.assert_close(ordered.order.inverse @ ordered.order.scale, torch.eye(16), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_direction_of_two_tokens_is_scaled_as_the_later_one():
    """What the last token shares with the first must not be seen as early as the first one."""
    order = TokenOrder(TokComConfig(vae={"latent_size": 4}, token_posterior=True, context={}, token_order=1.8))
    # Each token has a direction of its own, and the last one a hundredth of its variance along the first one's.
    parts = torch.diag_embed(torch.eye(4))
    parts[3, 0, 0] = 0.01
    scale = order.fit(parts, torch.zeros(4, 4))
    scales = torch.exp(1.8 * torch.tensor([1.5, 0.5, -0.5, -1.5]))
    torch.testing.assert_close(scale.diagonal()[1:], scales[1:], rtol=1e-3, atol=0)
    torch.testing.assert_close(scale[0, 0], 1.01 / (1 / scales[0] + 0.01 / scales[3]), rtol=1e-2, atol=0)
    assert scale[0, 0] < scales[0] / 3


@torch.no_grad()
def test_a_guess_takes_the_states_of_the_prediction_before(model, call):
    x, _, before = call
    t, table = torch.full((3,), 0.3), model.context.model.embed_tokens.weight
    first = denoise(model, x, t, before)
    again = denoise(model, x, t, before, first)
    # The posterior of the first prediction is what the denoiser reads.
    likelihood = torch.cat([evidence(model, chunks, 0.3) for chunks in x]).view(6, 4, -1)
    guess = (likelihood + first.states.view(6, 4, -1) @ table.T).softmax(-1) @ table
    prior = torch.nn.functional.pad(model.context.head_states(before), (0, 0, 0, 4))
    states = model.posterior.follow(model.denoiser, table, guess, prior, t, before)
    torch.testing.assert_close(again.states, states, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(again.states, first.states, atol=1e-2)
    # Without states, as guidance leaves them out, the heads say what they say in a first prediction.
    torch.testing.assert_close(denoise(model, x, t, before, Denoised(x)).states, first.states)


@torch.no_grad()
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 4), (2, 2)])
def test_the_denoiser_that_is_told_the_tokens_is_a_language_model(size, stride):
    """Every second block is told, from the offset on; no token sees itself, and noise and latents say nothing."""
    model = small("posterior", **LOSSES | {"told_weight": 0.5, "noise_draws": 1 / stride})
    ids, span = torch.randint(0, 50, (3, 26), generator=seeded(1)), 4 * size
    mask = torch.ones_like(ids)
    mask[2, 15:] = 0
    starts = torch.arange(1, 26 - span + 1, 2 * span)
    blocks = -(-(25 // span) // stride)
    times = torch.rand(3, blocks, generator=seeded(4))
    options = {"timesteps": times, "block_size": size, "offset": 1, "block_stride": stride}
    found = model(ids, mask, noise=torch.randn(3, blocks, size, 16), **options)
    labels = ids.masked_fill(mask == 0, -100)
    table, nats = model.context.model.embed_tokens.weight, []
    states = model.context(ids)
    for row in range(3):
        for index, start in enumerate(starts.tolist()):
            c, tokens = states[row, start][None], ids[row, start : start + span]
            t = times[row, index * blocks // len(starts)][None]
            prior = torch.zeros(1, span, 48)
            prior[:, :4] = model.context.head_states(c)
            read = model.posterior.read(table[tokens] / table.square().mean().sqrt())
            inputs = prior + torch.cat([torch.zeros(1, 48), read[:-1]])
            logits = (prior + model.denoiser(inputs, t, c).clean_latents) @ table.T
            lost = -logits.log_softmax(-1)[0, torch.arange(span), tokens]
            nats.append(lost[labels[row, start : start + span] >= 0])
    torch.testing.assert_close(found.told_loss, torch.cat(nats).mean())
    model.config.told_weight = 0.0
    without = model(ids, mask, noise=torch.randn(3, blocks, size, 16), **options)
    assert without.told_loss is None
    model.config.told_weight = 0.5
    with_same = {"noise": torch.randn(3, blocks, size, 16), **options}
    one = model(ids, mask, **with_same)
    model.config.told_weight = 0.0
    torch.testing.assert_close(one.loss, model(ids, mask, **with_same).loss + 0.5 * one.told_loss)


@torch.no_grad()
def test_a_hidden_text_is_no_text(model, call):
    x, t, before = call
    mask = torch.tensor([[True], [False], [True]])
    hidden = denoise(model, x, t, before * mask).clean_latents
    none, shown = (denoise(model, x, t, text).clean_latents for text in (None, before))
    torch.testing.assert_close(hidden, torch.where(mask[..., None], shown, none))
    assert not torch.allclose(none, shown, atol=1e-2)


@torch.no_grad()
def test_shifted_draws_are_the_blocks_that_start_there(model):
    ids = torch.randint(0, 50, (3, 16), generator=seeded(1))
    noise, timesteps = torch.randn(3, 6, 1, 16), torch.rand(3, 6)
    both = model(ids, noise=noise, timesteps=timesteps, block_size=1, draw_shift=2)
    assert both.clean_latents.shape == (3, 6, 1, 16)
    for draw, offset in enumerate((0, 2)):
        own = slice(3 * draw, 3 * draw + 3)
        # A row that ends with the draw's last block, whose blocks are both draws of this call.
        alone = model(
            ids[:, : offset + 12], noise=noise[:, own].repeat(1, 2, 1, 1), timesteps=timesteps[:, own].repeat(1, 2),
            block_size=1, offset=offset,
        )  # fmt: skip
        torch.testing.assert_close(both.clean_latents[:, own], alone.clean_latents[:, :3], atol=1e-5, rtol=1e-4)


def test_a_few_steps_lower_its_cross_entropy(model):
    model = small("posterior", **LOSSES | {"mse_weight": 0.0, "cross_entropy_weight": 1.0, "head_weight": 0.0})
    model.vae.requires_grad_(False)
    ids = torch.randint(0, 50, (4, 16), generator=seeded(2))
    torch.manual_seed(0)
    arguments = {"noise": torch.randn(4, 6, 1, 16), "timesteps": torch.rand(4, 6), "block_size": 1, "draw_shift": 2}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        output = model(ids, **arguments)
        losses.append(output.cross_entropy_loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.posterior.read.parameters())


def test_what_it_needs_is_said():
    with pytest.raises(ValueError, match="token_posterior needs a context"):
        TokComConfig(token_posterior=True)
    for wrong in ({"heads_first": True}, {"token_order": 0.5}, {"told_weight": 0.5}, {"sampler": "multirate"}):
        with pytest.raises(ValueError, match="needs token_posterior=True"):
            TokComConfig(context=CONTEXT, **wrong)
    with pytest.raises(ValueError, match="guidance_scale needs two; take 'multistep'"):
        small("posterior", context_dropout=0.1).generate(num_chunks=1, sampler="multirate", guidance_scale=2.0)
    with pytest.raises(ValueError, match="sampler='multirate' needs token_posterior=True"):
        small("context").generate(num_chunks=1, sampler="multirate")
    with pytest.raises(ValueError, match="token_order must be at least 0, got -1"):
        small("posterior", token_order=-1)
    with pytest.raises(ValueError, match="self_conditioning has no meaning with token_posterior"):
        small("posterior", denoiser=small("posterior").config.denoiser.to_dict() | {"self_conditioning": True})
    with pytest.raises(ValueError, match=r"denoiser\.causal must be True"):
        wrong = small("posterior").config.denoiser.to_dict() | {"causal": False}
        small("posterior", denoiser=wrong)
    with pytest.raises(ValueError, match=r"denoiser\.latent_size must be 48"):
        small("posterior", denoiser=small("context").config.denoiser.to_dict())
