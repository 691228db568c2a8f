"""`RecentTokens`: what it reads, its part in predictions with and without a call of the denoiser, and its training."""

import pytest
import torch

from tests.helpers.tokcom_evidence import evidence, text_before
from tests.helpers.tokcom_tools import seeded, small
from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.models import tokcom_token_posterior
from tokcom_hf.models.tokcom_denoise import PathPoint, Predictions, denoise
from tokcom_hf.models.tokcom_flow_matching import MOST_LAG, call_times, interpolate

SETTINGS = {"recent_size": 6, "heads_first": True, "cross_entropy_weight": 0.3, "sampler": "multirate"}


@pytest.fixture(scope="module")
def model():
    return small("posterior", **SETTINGS)


@pytest.fixture
def call(model):
    """Three blocks of two chunks: noisy latents, time, text before."""
    return torch.randn(3, 2, 16, generator=seeded(3)), torch.full((1,), 0.4), text_before(model)


@torch.no_grad()
def corrected(model, states, guess) -> torch.Tensor:
    """s + up(linear(norm(h + SwiGLU(norm(h))))), token by token, of states (tokens, state) and guesses (tokens, width)."""
    recent, found = model.recent, []
    for index in range(len(states)):
        before = [guess[i] if i >= 0 else torch.zeros(6) for i in range(index - 3, index)]
        hidden = recent.state(states[index]) + recent.before(torch.cat(before)) + recent.place.weight[index % 4]
        hidden = recent.last_norm(hidden + recent.mlp(recent.norm(hidden)))
        found.append(states[index] + recent.up(recent.write(hidden)))
    return torch.stack(found)


@torch.no_grad()
def expected(model, x, t, states, known) -> torch.Tensor:
    """Clean latents (chunks, latent) of a block of states (tokens, state); `known` are the states behind the guesses."""
    table = model.context.model.embed_tokens.weight
    likelihood = evidence(model, x, t)
    rows = model.recent.read(table / table.square().mean().sqrt())
    guess = (likelihood + known @ table.T).softmax(-1) @ rows
    p = (likelihood + corrected(model, states, guess) @ table.T).softmax(-1)
    return model.posterior.write((p @ model.vae.embed_tokens.weight).view(len(x), 4, -1))


@pytest.mark.parametrize("grad", [False, True])
def test_guesses_at_recent_tokens_correct_the_states_of_the_denoiser(model, call, grad):
    x, t, before = call
    with torch.set_grad_enabled(grad):
        found = denoise(model, x, t, before)
    assert (found.scores is None) == grad
    for block in range(3):
        states = found.states[block].detach()
        wanted = expected(model, x[block], 0.4, states, states)
        torch.testing.assert_close(found.clean_latents[block].detach(), wanted, atol=2e-4, rtol=2e-3)


@torch.no_grad()
def test_a_token_reads_the_three_tokens_before_it(model):
    states, guesses = torch.randn(1, 8, 48, generator=seeded(1)), torch.randn(1, 8, 6, generator=seeded(2))
    found = model.recent(states, guesses)
    for token in range(8):
        other = guesses.clone()
        other[:, token] += 1
        changed = (model.recent(states, other) != found).any(dim=-1)[0]
        assert changed.nonzero().flatten().tolist() == [i for i in range(token + 1, token + 4) if i < 8]


@torch.no_grad()
@pytest.mark.parametrize("kept", [True, False])
def test_between_two_calls_corrections_go_on_and_the_denoiser_rests(model, call, kept, monkeypatch):
    (x, _, before), recent = call, model.recent.forward
    if not kept:
        monkeypatch.setattr(tokcom_token_posterior, "SCORES_KEPT", 0)
    path = Predictions(model, lambda x_t, t, earlier: denoise(model, x_t, torch.full((1,), t), before, earlier))
    corrections: list[torch.Tensor] = []
    monkeypatch.setattr(model.recent, "forward", lambda *call: corrections.append(recent(*call)) or corrections[-1])
    path(x, 0.3)
    states, correction = path.calls[0][0].states, corrections[-1]
    monkeypatch.setattr(model.denoiser, "forward", None)
    for t in (0.35, 0.5):
        later = torch.randn(3, 2, 16, generator=seeded(5))
        found = path.between(later, t)
        for block in range(3):
            known = states[block] + model.recent.up(correction[block])
            wanted = expected(model, later[block], t, states[block], known)
            torch.testing.assert_close(found[block], wanted, atol=2e-4, rtol=2e-3)
        correction = corrections[-1]


@torch.no_grad()
def test_at_t_0_the_heads_alone_predict(model, call):
    x, _, before = call
    found = denoise(model, x, torch.zeros(1), before)
    assert found.correction is None
    torch.testing.assert_close(found.states[:, :4], model.context.head_states(before))


def training_inputs(blocks: int, size: int) -> dict[str, torch.Tensor]:
    generator = seeded(1)
    return {
        "input_ids": torch.randint(0, 50, (3, 4 * blocks * size), generator=generator),
        "noise": torch.randn(3, blocks, size, 16, generator=generator),
        "timesteps": torch.rand(3, blocks, generator=generator) * 0.8 + 0.1,
        "block_size": size,
    }


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_a_prediction_may_call_the_denoiser_at_an_earlier_time(model, size):
    inputs = training_inputs(2, size)
    times = inputs["timesteps"]
    same = model(**inputs, call_times=times)
    torch.testing.assert_close(same.loss, model(**inputs).loss)
    earlier = times * torch.tensor([0.0, 0.5])
    found = model(**inputs, call_times=earlier).clean_latents
    assert not torch.allclose(found, same.clean_latents, atol=1e-2)
    # Step by step: states of the call, from the same noise, then what recent tokens and evidence make of them at t.
    x1 = model.standardize(model.encode(inputs["input_ids"])).view_as(inputs["noise"])
    before = model.context(inputs["input_ids"])[:, :: 4 * size][:, :2]
    for row in range(3):
        for block in range(2):
            one = slice(block, block + 1)
            noise, clean, c = inputs["noise"][row, one], x1[row, one], before[row, one]
            point = PathPoint(interpolate(noise, clean, earlier[row, one]), earlier[row, one])
            states = denoise(model, *point, c).states[0]
            t = times[row, block]
            wanted = expected(model, interpolate(noise, clean, t[None])[0], t, states, states)
            torch.testing.assert_close(found[row, block], wanted, atol=2e-4, rtol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_recent_tokens_are_told_every_block_and_the_denoiser_every_second_one(size):
    model = small("posterior", **SETTINGS, told_weight=0.5)
    inputs = training_inputs(4, size)
    found = model(**inputs).told_loss
    ids, states = inputs["input_ids"], model.context(inputs["input_ids"])
    table, span, nats = model.context.model.embed_tokens.weight, 4 * size, []
    rows = model.recent.read(table / table.square().mean().sqrt())
    # Blocks of all rows follow each other.
    for index in range(3 * 4):
        row, block = divmod(index, 4)
        tokens, c = ids[row, block * span : (block + 1) * span], states[row, block * span][None]
        known = torch.zeros(1, span, 48)
        known[:, :4] = model.context.head_states(c)
        if index % 2 == 0:
            guess, t = table[tokens].view(size, 4, 48), inputs["timesteps"][row, block][None]
            known = model.posterior.follow(model.denoiser, table, guess, known, t, c)
        logits = corrected(model, known[0], rows[tokens]) @ table.T
        nats.append(-logits.log_softmax(-1)[torch.arange(span), tokens])
    torch.testing.assert_close(found, torch.cat(nats).mean())


def test_training_reaches_every_parameter(model):
    model.zero_grad()
    inputs = training_inputs(2, 1)
    model(**inputs, call_times=inputs["timesteps"] * 0.5).loss.backward()
    for name, parameter in model.recent.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()


def test_half_of_the_calls_are_at_the_time_of_their_use_and_a_quarter_at_0():
    t = torch.rand(20000, generator=seeded(1)) * 0.9 + 0.05
    calls = call_times(t, seeded(2))
    assert abs((calls == t).float().mean() - 0.5) < 0.02
    assert abs((calls == 0).float().mean() - 0.25) < 0.02
    lags = torch.logit(t) - torch.logit(calls)
    rest = lags[(calls != t) & (calls != 0)]
    assert rest.min() >= -1e-3 and rest.max() <= MOST_LAG + 1e-3
    assert abs(rest.mean() - MOST_LAG / 2) < 0.1


@torch.no_grad()
def test_what_was_trained_is_what_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TokComModel.from_pretrained(tmp_path).eval()
    prompt = torch.randint(0, 50, (2, 6), generator=seeded(4))
    settings = {"num_generate_chunks": 4, "num_steps": 2}
    one, two = (m.generate(prompt, generator=seeded(5), **settings) for m in (model, loaded))
    assert one.tolist() == two.tolist()
    # Changed weights act in the next call, although products of them are kept.
    for parameter in loaded.recent.parameters():
        parameter.mul_(-2)
    assert loaded.generate(prompt, generator=seeded(5), **settings).tolist() != one.tolist()


@torch.no_grad()
def test_what_is_kept_under_autocast_serves_without_it():
    settings = {"num_chunks": 4, "num_steps": 2, "sampler": "multirate"}
    fresh = small("posterior", **SETTINGS).generate(generator=seeded(5), **settings)
    model = small("posterior", **SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(generator=seeded(5), **settings)
    assert model.generate(generator=seeded(5), **settings).tolist() == fresh.tolist()


def test_settings_that_would_not_act_are_refused():
    with pytest.raises(ValueError, match="recent_size=4 needs token_posterior=True"):
        TokComConfig(recent_size=4)
    with pytest.raises(ValueError, match="recent_size must be at least 0, got -1"):
        small("posterior", recent_size=-1)
    plain = small("context")
    inputs = training_inputs(2, 1)
    with pytest.raises(ValueError, match="call_times are for models with token_posterior"):
        plain(**inputs, call_times=inputs["timesteps"])
    with pytest.raises(ValueError, match="call_times must be"):
        small("posterior", recent_size=4)(**inputs, call_times=inputs["timesteps"][:2])
