"""`read_guesses`: the context reads the guesses at a block's tokens behind the text, and predicts the tokens behind them."""

import pytest
import torch

from tests.helpers.tokcom_evidence import TEXT, evidence
from tests.helpers.tokcom_runs import Rows, distillation_trainer
from tests.helpers.tokcom_tools import seeded, small
from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.evaluation.tokcom_controls import without_denoiser
from tokcom_hf.evaluation.tokcom_denoising import denoising_metrics
from tokcom_hf.models.tokcom_context_encoder import TextBefore, read_before
from tokcom_hf.models.tokcom_denoise import Predictions, denoise
from tokcom_hf.models.tokcom_flow_matching import interpolate
from tokcom_hf.models.tokcom_generation import Prompt, TextSoFar

SETTINGS = {"read_guesses": True, "heads_first": True, "cross_entropy_weight": 0.3, "sampler": "multirate"}


@pytest.fixture(scope="module")
def model():
    return small("posterior", **SETTINGS)


@pytest.fixture
def call(model):
    """Three blocks of two chunks: noisy latents, time, text before."""
    with torch.no_grad():
        text = read_before(model, TEXT, torch.tensor([TEXT.shape[1]]))[1]
    return torch.randn(3, 2, 16, generator=seeded(3)), torch.full((1,), 0.4), text


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=seeded(1))


@torch.no_grad()
def first_head(model, states) -> torch.Tensor:
    return states @ model.context.heads.weight[:48].T


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_tokens_that_are_true_tokens_are_read_as_the_text_is(model, attention):
    ids, starts = ids_of(2, 24), torch.tensor([[4, 12], [5, 13]])
    shown = torch.tensor([[True, True, False, True], [True, True, True, True]])
    model.context.model.set_attn_implementation(attention)
    states, text = read_before(model, ids, starts, shown)
    table = model.context.model.embed_tokens.weight
    soft = torch.cat([table[ids[row, start : start + 7]][None] for row in range(2) for start in starts.flatten()])
    # Twice, because the cache must be as it was.
    found = [text.read_on(soft) for _ in range(2)][1].view(2, 4, 7, 48)
    model.context.model.set_attn_implementation("sdpa")
    for row in range(2):
        for block, start in enumerate(starts.flatten()):
            wanted = first_head(model, states[row, start + 1 : start + 8]) * shown[row, block]
            torch.testing.assert_close(found[row, block], wanted, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(text.state.view(2, 4, 48)[row, block], states[row, start] * shown[row, block])


@torch.no_grad()
def test_the_denoiser_starts_from_the_context_that_has_read_the_guesses(model, call):
    x, t, text = call
    found = denoise(model, x, t, text)
    table, heads = model.context.model.embed_tokens.weight, model.context.head_states(text.state)
    for row in range(3):
        prior = torch.cat([heads[row], torch.zeros(4, 48)])
        probabilities = (evidence(model, x[row], 0.4) + prior @ table.T).softmax(-1)
        guess, sure = probabilities @ table, probabilities.max(-1).values
        start = table[model.context.start_token_id][None]
        read = torch.cat([start, table[TEXT[row]], guess[:-1]])[None]
        ahead = first_head(model, model.context.model(inputs_embeds=read).last_hidden_state[0, -7:])
        prior = torch.cat([heads[row, :1], ahead])[None]
        states = model.posterior.follow(model.denoiser, table, guess.view(2, 4, 48), prior, t, text.state[row][None])
        # The denoiser adds to what the context says as far as a guess before may be wrong: nothing to the first token.
        unknown = torch.stack([1 - sure[:place].prod() for place in range(8)])
        wanted = prior + unknown[:, None] * (states - prior)
        torch.testing.assert_close(found.states[row], wanted[0], atol=1e-3, rtol=1e-3)
        assert 0 < unknown[1] < unknown[7] and (wanted - prior)[0, 1:].abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_of_tokens_behind_known_ones_the_context_alone_decides(model, call):
    x, _, text = call

    def added(x, t: float) -> float:
        """Largest part of a state that comes from the denoiser."""
        time = torch.full((1,), t)
        states, without = (denoise(each, x, time, text).states for each in (model, without_denoiser(model)))
        return (states - without).abs().max().item()

    # At t = 0.999 the latents say what each token is, more so far from the origin.
    assert added(200 * x, 0.999) < 1e-3 and added(x, 0.4) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
def test_the_context_alone_decides_the_first_token_of_a_block(model, call, grad):
    x, t, text = call
    heads = model.context.head_states(text.state)
    with torch.set_grad_enabled(grad):
        found = denoise(model, x, t, text)
    assert (found.scores is None) == grad
    torch.testing.assert_close(found.states[:, 0], heads[:, 0])
    corrections = found.correction.detach().view(3, 8, -1).abs().amax(dim=-1)
    assert corrections[:, 0].max() == 0 and corrections[:, 1:].min() > 1e-4


@torch.no_grad()
def test_between_two_calls_the_context_decides_the_first_token_too(model, call):
    x, _, text = call
    path = Predictions(model, lambda x_t, t, earlier: denoise(model, x_t, torch.full((1,), t), text, earlier))
    path(x, 0.3)
    path.between(x, 0.5)
    corrections = path.correction.view(3, 8, -1).abs().amax(dim=-1)
    assert corrections[:, 0].max() == 0 and corrections[:, 1:].min() > 1e-4


@torch.no_grad()
def test_while_they_learn_denoiser_and_recent_tokens_add_to_every_token(model):
    ids, noise = ids_of(2, 16), torch.randn(2, 2, 2, 16, generator=seeded(4))
    times = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    output = model(ids, block_size=2, noise=noise, timesteps=times)
    x_t = interpolate(noise, model.standardize(model.encode(ids)).view_as(noise), times[..., None, None])
    text = read_before(model, ids, torch.tensor([0, 8]))[1]
    learns, writes = (denoise(model, x_t.flatten(0, 1), times.flatten(), text, learns=each) for each in (True, False))
    torch.testing.assert_close(output.clean_latents.flatten(0, 1), learns.clean_latents, atol=1e-4, rtol=1e-3)
    changes = (learns.states - writes.states).abs().amax(dim=-1), learns.correction.view(4, 8, -1).abs().amax(dim=-1)
    assert min(change[:, 0].min() for change in changes) > 1e-4
    assert not torch.allclose(learns.clean_latents, writes.clean_latents, atol=1e-3)


@torch.no_grad()
def test_where_the_text_is_hidden_the_denoiser_alone_decides(model, call):
    """Its correction is whole there, as it is without a context."""
    x, t, text = call
    shown = torch.tensor([[True], [False], [True]])
    hidden = TextBefore(text.state * shown, lambda soft: text.read_on(soft) * shown[..., None])
    found, without, known = (denoise(model, x, t, each) for each in (hidden, None, text))
    torch.testing.assert_close(found.states[1], without.states[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.states[[0, 2]], known.states[[0, 2]], atol=1e-4, rtol=1e-4)
    # Recent tokens correct the first token there, and nowhere else.
    first = found.correction.view(3, 8, -1)[:, 0].abs().amax(dim=-1)
    assert first[1] > 1e-4 and first[0] == first[2] == 0


@torch.no_grad()
def test_no_state_depends_on_a_guess_behind_it(model, call):
    x, t, text = call
    one = denoise(model, x, t, text).states
    x[:, 1] = 5.0
    change = (denoise(model, x, t, text).states - one).abs().amax(dim=(0, 2))
    assert change[:5].max() < 1e-5 and change[5:].min() > 1e-3


@torch.no_grad()
def test_padding_and_several_draws_change_nothing_of_what_is_read():
    model = small("posterior", **SETTINGS)
    ids, table = ids_of(2, 9), model.context.model.embed_tokens.weight
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    text = TextSoFar(model, Prompt.of(model, ids, mask), copies=2)
    new = ids_of(4, 8)
    text.read(new)
    soft = table[ids_of(12, 5)]
    found = text.before(3).read_on(soft)
    assert text.cache.get_seq_length() == 1 + 9 + 8
    for row in range(4):
        alone = TextSoFar(model, Prompt.of(model, ids[row // 2][mask[row // 2] > 0][None], None))
        alone.read(new[row : row + 1])
        rows = slice(3 * row, 3 * row + 3)
        for draw in range(3):
            wanted = alone.before(1).read_on(soft[rows][draw][None])[0]
            torch.testing.assert_close(found[rows][draw], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"block_size": 1}, {"block_size": 2, "best_of": 2}, {"block_size": 0}])
def test_generation_calls_the_context_and_is_reproducible(model, settings):
    def generate(each):
        return each.generate(TEXT, num_generate_chunks=3, num_steps=3, generator=seeded(2), **settings)

    found = generate(model)
    assert found.shape == (3, 5 + 12) and torch.equal(found, generate(model))
    without = small("posterior", **SETTINGS | {"read_guesses": False})
    without.load_state_dict(model.state_dict())
    assert not torch.equal(found, generate(without))


def test_training_reads_text_in_front_of_shown_blocks_alone(model):
    ids, shown = ids_of(2, 16), torch.tensor([[True, False, True, True]] * 2)
    generator = seeded(4)
    given = {
        "block_size": 1, "noise": torch.randn(2, 4, 1, 16, generator=generator),
        "timesteps": torch.rand(2, 4, generator=generator), "context_mask": shown,
    }  # fmt: skip
    found = model(ids, call_times=given["timesteps"] / 2, **given)
    other = ids.clone()
    other[:, :4] = (other[:, :4] + 1) % 50
    changed = model(other, latents=model.encode(ids), call_times=given["timesteps"] / 2, **given)
    same = (found.clean_latents - changed.clean_latents).abs().amax(dim=(0, 2, 3))
    # The first two blocks have no text or none that is shown; the first block's own latents are the same.
    assert same[:2].max() < 1e-5 and same[2:].min() > 1e-3


def test_the_flow_trains_the_context_through_what_it_reads():
    model = small("posterior", **SETTINGS, head_weight=0.0, told_weight=0.5)
    layer = model.context.model.layers[0].mlp.down_proj.weight
    model.train()
    model(ids_of(2, 16), block_size=1).cross_entropy_loss.backward()
    assert layer.grad.abs().max() > 0
    model.zero_grad()
    model(ids_of(2, 16), block_size=1).told_loss.backward()
    # Recent tokens alone are told.
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.denoiser.parameters())
    assert model.recent.up.weight.grad.abs().max() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = small("posterior", **SETTINGS, noise_draws=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        shape = (2, 6, 1)
        given = {"noise": torch.randn(*shape, 16, generator=seeded(4)), "timesteps": torch.full(shape[:2], 0.4)}
        losses.append(model(ids_of(2, 18), block_size=1, draw_shift=2, offset=3, **given).loss)
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*losses)
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


def test_saved_models_distillation_and_reports_read_on(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TokComModel.from_pretrained(tmp_path)
    ids = ids_of(4, 16)
    for each in (loaded.reconstruct(ids), loaded.denoise_reconstruct(ids, 0.3, 4, generator=seeded())):
        assert each.shape == ids.shape
    assert torch.equal(
        loaded.denoise_reconstruct(ids, 0.3, 4, generator=seeded()),
        model.denoise_reconstruct(ids, 0.3, 4, generator=seeded()),
    )
    assert 0 <= denoising_metrics(loaded, ids, torch.ones_like(ids), (0.5,))["denoised_accuracy_t_0.5"] <= 1
    rows = Rows(8)
    trainer = distillation_trainer(tmp_path / "student", loaded, rows, max_steps=2, student_steps=3, teacher_steps=4)
    before = trainer.model.denoiser.output_proj.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.denoiser.output_proj.weight, before)


def test_what_cannot_work_is_refused(model, call):
    x, t, text = call
    with pytest.raises(ValueError, match="pass a `TextBefore` with `read_on`"):
        denoise(model, x, t, text.state)
    with pytest.raises(ValueError, match="pass a `TextBefore` with `read_on`"):
        denoise(model, x, t, TextBefore(text.state))
    assert denoise(model, x, t, None).clean_latents.shape == x.shape
    with pytest.raises(ValueError, match="read_guesses=True needs token_posterior=True"):
        TokComConfig(read_guesses=True)
    with pytest.raises(ValueError, match=r"told_weight=0\.5 trains recent tokens alone"):
        small("posterior", read_guesses=True, told_weight=0.5, recent_size=0)
