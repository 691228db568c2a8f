"""A denoiser whose deep layers read finished chunks once, and the sampler that draws tokens from it."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tokcom_hf import DenoisedModelConfig, TokComModel
from tokcom_hf.metrics.compute import count_flops
from tokcom_hf.metrics.denoising import next_token_loss
from tokcom_hf.models.flow_matching import commit_places
from tokcom_hf.trainers.noise_plan import draw_token_times, plan_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from test_tokcom_training import SHAPE, denoiser_trainer
from test_tokcom_training import joint_model as joint


def model(self_conditioning: bool = False, **flow) -> TokComModel:
    """Random weights large enough that everything matters, but for how likely tokens are: those differ moderately."""
    denoiser = SHAPE | {"attention": "block_causal", "num_context_layers": 2, "self_conditioning": self_conditioning}
    denoiser = flow.pop("denoiser", denoiser)
    defaults = {"token_time_std": 1.0, "token_window_size": 24, "token_attention_heads": 2, "scale_input": True}
    defaults["token_mlp_size"] = 48
    defaults["eos_token_id"] = None
    built = joint(denoiser=denoiser, **defaults | flow).eval()
    with torch.no_grad():
        for parameter in built.denoiser.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return built


INDEX = torch.tensor([0, 0, 1, 1, 2, 2])


def test_blocks_see_themselves_and_finished_chunks_only():
    net = model()
    clean, x, t = torch.randn(1, 6, 32), torch.randn(1, 6, 32), torch.rand(1, 3)

    def run(clean, x):
        return net(x, t, context=clean, block_index=INDEX).token_hidden[0]

    before = run(clean, x)

    def changed(which: str, chunk: int) -> list[int]:
        values = {"clean": clean.clone(), "x": x.clone()}
        values[which][0, chunk] += 1.0
        return (run(**values) - before).abs().amax((1, 2)).gt(1e-6).nonzero().flatten().tolist()

    assert changed("clean", 0) == [2, 3, 4, 5]
    assert changed("clean", 3) == [4, 5]
    assert changed("clean", 5) == []
    assert changed("x", 2) == [2, 3]


def test_a_block_starts_from_the_state_of_the_chunk_before_it():
    net = model()
    with torch.no_grad():
        for layer in net.denoiser.layers:
            layer.self_attn.o_proj.weight.zero_()
        for module in (net.token_window, net.token_attention):
            for parameter in module.parameters():
                parameter.zero_()
    clean, x, t = torch.randn(1, 6, 32), torch.randn(1, 6, 32), torch.rand(1, 3)

    def states(clean):
        return net(x, t, context=clean, block_index=INDEX).token_hidden[0]

    other = clean.clone()
    other[0, 0] += 1.0
    # Without attention of the denoiser's own, only the first chunk of each later block knows of what stands before.
    assert (states(clean) - states(other)).abs().amax((1, 2)).gt(1e-6).tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (4,)])
def test_finishing_chunks_in_any_portions_equals_the_training_layout(sizes):
    net = model()
    clean, x, t = torch.randn(2, 6, 32), torch.randn(2, 6, 32), torch.rand(2, 3)
    whole = net(x, t, context=clean, block_index=INDEX)
    past, start = None, 0
    for size in sizes:
        past = net.finish(clean[:, start : start + size], past, start)
        start += size
    last = net(x[:, 4:], t[:, 2], past_key_values=past, position_offset=4, previous=clean[:, 3:4])
    torch.testing.assert_close(whole.token_hidden[:, 4:], last.token_hidden, atol=1e-5, rtol=1e-5)


def ways_to_token_hidden(net):
    """→ a function that runs the training layout, the last block behind finished chunks, and the first."""
    clean, x, t = torch.randn(1, 6, 32), torch.randn(1, 6, 32), torch.rand(1, 3)
    past = net.finish(clean[:, :4])

    def outputs() -> list[torch.Tensor]:
        generating = net(x[:, 4:], t[:, 2], past_key_values=past, position_offset=4, previous=clean[:, 3:4])
        start = net(x[:, :2], t[:, 0])
        return [net(x, t, context=clean, block_index=INDEX).token_hidden, generating.token_hidden, start.token_hidden]

    return outputs


def test_tokens_of_finished_chunks_are_read_in_training_and_generation():
    net = model().train()
    outputs = ways_to_token_hidden(net)
    before = outputs()
    before[0].square().sum().backward()
    trained = dict(net.token_attention.named_parameters())
    # A bias of all keys alike shifts every score but that of the key that says nothing.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values()), trained.keys()
    with torch.no_grad():
        net.token_attention.o_proj.weight.zero_()
    changed = [(now - then).abs().amax((0, 2, 3)).gt(1e-6).tolist() for now, then in zip(outputs(), before)]
    # Nothing stands before the first block, and nothing before a text without a prompt.
    assert changed == [[False, False, True, True, True, True], [True, True], [False, False]]


def test_the_map_behind_token_attention_works_on_every_token():
    """Also where nothing stands before, so that a text's first chunk is generated as it was trained."""
    net = model().train()
    outputs = ways_to_token_hidden(net)
    before = outputs()
    torch.testing.assert_close(before[2], before[0][:, :2], atol=1e-5, rtol=1e-5)
    before[0].square().sum().backward()
    trained = dict(net.token_mlp.named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values()), trained.keys()
    with torch.no_grad():
        net.token_mlp[1].down_proj.weight.zero_()
    assert all(bool(((now - then).abs().amax(-1) > 1e-6).all()) for now, then in zip(outputs(), before))


def test_tokens_that_are_all_noise_cost_less_and_the_same():
    net = model(train_embeddings=True).train()
    clean, labels = torch.randn(2, 6, 32), torch.randint(0, 50, (2, 6, 4))
    times = (torch.arange(4) < torch.randint(0, 4, (2, 6, 1))).float()
    asked, index = times < 1, torch.arange(6)
    times[0, :, 3], times[1, 0] = 0.3, 0.2
    unseen = times[asked] == 0
    assert 0 < unseen.sum() < len(unseen)
    results = []
    for known in (None, unseen):
        net.zero_grad()
        hidden = net(
            clean * net.per_entry(times), torch.full((1,), 0.5), token_times=times, context=clean, block_index=index,
            only_tokens=True, token_mask=asked,
        ).token_hidden  # fmt: skip
        loss = net.token_cross_entropy(hidden, labels[asked], known)
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        )
    (whole, gradients), (split, split_gradients) = results
    torch.testing.assert_close(split, whole)
    assert gradients.keys() == split_gradients.keys() and len(gradients) > 30
    for name, gradient in gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, atol=1e-6, rtol=1e-4)
    hidden = hidden.detach()
    whole = count_flops(lambda: net.token_cross_entropy(hidden, labels[asked]))
    assert count_flops(lambda: net.token_cross_entropy(hidden, labels[asked], unseen)) < whole
    # Nothing to ask for of one kind, or of both, is no error.
    for part in (unseen, ~unseen):
        alone = net.token_cross_entropy(hidden[part], labels[asked][part], unseen[part])
        torch.testing.assert_close(alone, net.token_cross_entropy(hidden[part], labels[asked][part]))
    assert net.token_cross_entropy(hidden[:0], labels[asked][:0], unseen[:0]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "commit", "block_size": 1},
        {"sampler": "euler", "block_size": 2, "guidance_scale": 1.5},
        {"sampler": "euler", "block_size": 1, "attention": "bidirectional"},
    ],
)
def test_several_continuations_are_those_of_a_repeated_prompt(settings, monkeypatch):
    attention = settings.pop("attention", "block_causal")
    more = {} if attention == "block_causal" else {"token_attention_heads": 0, "token_mlp_size": 0}
    net = model(denoiser=SHAPE | {"attention": attention}, **more)
    ids, mask = torch.randint(1, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 3:] = 0
    options = {"num_generate_chunks": 3, "num_steps": 4, "temperature": 1.0, **settings}
    draw = lambda *rows, **named: net.generate(*rows, generator=torch.Generator().manual_seed(1), **options, **named)  # noqa: E731
    repeated = draw(ids.repeat_interleave(3, 0), prompt_mask=mask.repeat_interleave(3, 0))
    read, finish = [], net.finish

    def noted(latents, *rest):
        read.append(len(latents))
        return finish(latents, *rest)

    monkeypatch.setattr(net, "finish", noted)
    together = draw(ids, prompt_mask=mask, num_return_sequences=3)
    assert torch.equal(together, repeated) and len({tuple(row) for row in together.tolist()}) > 2
    blocks = 3 // settings["block_size"] + 3 % settings["block_size"]
    assert read == ([2] + [6] * (blocks - 1) if attention == "block_causal" else [])
    with pytest.raises(ValueError, match="num_return_sequences must be at least 1, got 0"):
        draw(ids, num_return_sequences=0)


def test_what_only_the_denoiser_finished_is_refused():
    net = model()
    past = net.denoiser.finish(torch.randn(1, 2, 32))
    with pytest.raises(ValueError, match="make them with TokComModel"):
        net(torch.randn(1, 1, 32), torch.zeros(1), past_key_values=past, position_offset=2)


@pytest.mark.parametrize("sampler", ["euler", "commit"])
@pytest.mark.parametrize("block_size", [None, 1, 3])
def test_a_batch_of_uneven_prompts_equals_its_rows(sampler, block_size):
    net = model(self_conditioning=sampler == "euler")
    rows = [torch.randint(1, 50, (length,)) for length in (7, 2, 4)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    # Nearly greedy, from no noise: nothing is left to chance.
    net._noise = lambda shape, generator: torch.zeros(shape)
    settings = {"num_generate_chunks": 4, "num_steps": 4, "block_size": block_size, "sampler": sampler}
    batch = net.generate(ids, prompt_mask=mask, posterior_temperature=1e-4, **settings)
    for place, row in enumerate(rows):
        single = net.generate(row[None], posterior_temperature=1e-4, **settings)
        assert torch.equal(single[0], batch[place, : len(row) + 16]), place


def test_round_trip(tmp_path):
    net = model()
    net.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.denoiser.num_context_layers == 2
    draw = lambda net: net.generate(  # noqa: E731
        torch.arange(8)[None], 0, 3, block_size=1, sampler="commit", generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(draw(net), draw(loaded))


def test_checkpointed_layers_have_the_same_gradients():
    net, grads = model().train(), []
    x, t = torch.randn(2, 6, 32), torch.rand(2, 3)
    for checkpointing in (False, True):
        if checkpointing:
            net.gradient_checkpointing_enable()
        net.zero_grad()
        net(x, t, context=x, block_index=INDEX).token_hidden.square().sum().backward()
        grads.append([layer.mlp.up_proj.weight.grad.clone() for layer in net.denoiser.context_encoder.layers])
    for one, other in zip(*grads):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_it_needs_block_causal_attention():
    with pytest.raises(ValueError, match="positive with attention='block_causal'; got 2 with 'bidirectional'"):
        DenoisedModelConfig(num_context_layers=2)


# ---------------------------------------------------------------- commit
def test_places_are_drawn_from_left_to_right():
    assert commit_places(4, 16) == [[0], [1], [2], [3]]
    assert commit_places(4, 2) == [[0, 1], [2, 3]]
    assert commit_places(4, 1) == [[0, 1, 2, 3]]


def test_committed_tokens_follow_the_models_own_distributions():
    net, count = model(), 4000
    prompt = torch.arange(8)
    with torch.no_grad():
        net.vae.lm_head.weight.mul_(0.5)
    ids = net.generate(
        prompt.expand(count, -1), num_generate_chunks=1, num_steps=4, sampler="commit",
        generator=torch.Generator().manual_seed(0),
    )[:, 8:]  # fmt: skip
    clean = net.standardize(net.encode(prompt[None]))
    past = net.finish(clean)

    def probabilities(known: list[int]) -> torch.Tensor:
        """Of the token behind the `known` ones of the chunk, from a forward of the model."""
        times = torch.zeros(1, 1, 4)
        times[..., : len(known)] = 1.0
        chunk = net.standardize(net.encode(torch.tensor([known + [0] * (4 - len(known))])))
        x = torch.where(net.per_entry(times) > 0, chunk, torch.randn(1, 1, 32))
        output = net(
            x, times.mean(-1), token_times=times, past_key_values=past, position_offset=2, previous=clean[:, -1:]
        )
        logits = torch.nn.functional.linear(output.token_hidden[0, 0, len(known)], net.token_head())
        return logits[:50].softmax(-1).detach()

    def close(drawn: torch.Tensor, expected: torch.Tensor) -> None:
        seen = torch.bincount(drawn, minlength=50)[:50] / len(drawn)
        spread = (expected * (1 - expected) / len(drawn)).sqrt()
        assert bool(((seen - expected).abs() < 5 * spread + 1e-3).all())
        # Not merely even.
        assert (expected - 1 / 50).abs().max() > 10 / 50 / len(drawn) ** 0.5

    close(ids[:, 0], probabilities([]))
    first = int(ids[:, 0].mode().values)
    behind = ids[ids[:, 0] == first]
    close(behind[:, 1], probabilities([first]))
    second = int(behind[:, 1].mode().values)
    assert not torch.allclose(probabilities([first]), probabilities([(first + 1) % 50]), atol=1e-3)
    rest = behind[behind[:, 1] == second]
    if len(rest) > 200:
        close(rest[:, 2], probabilities([first, second]))


def test_few_steps_draw_several_tokens_at_once(monkeypatch):
    net = model()
    calls = []
    forward = net.denoiser.forward
    monkeypatch.setattr(net.denoiser, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    for steps, passes in ((1, 1), (2, 2), (4, 4), (50, 4)):
        calls.clear()
        assert net.generate(num_chunks=3, num_steps=steps, sampler="commit").shape == (1, 12)
        assert len(calls) == passes


def test_commit_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a model trained with token_time_std"):
        joint().generate(num_chunks=2, sampler="commit")
    with pytest.raises(ValueError, match="another sampler than heun and commit"):
        model().generate(num_chunks=2, sampler="commit", token_lag=1.0)
    with pytest.raises(ValueError, match="takes another one"):
        model().denoise_reconstruct(torch.randint(50, (1, 8)), sampler="commit")
    with pytest.raises(ValueError, match="euler, renoise, heun, or commit"):
        model().generate(num_chunks=2, sampler="magic")


# ---------------------------------------------------------------- training
def test_cut_chunks_are_clean_up_to_a_place_and_noise_behind_it():
    net = model(token_cut_rate=0.5)
    own, _, times = draw_token_times(torch.full((500, 4), 0.3), net.config, torch.Generator().manual_seed(0))
    own, times = own.view(-1, 4), times.view(-1)
    known = own > 0.999
    cut = (known | (own < 1e-3)).all(-1)
    assert abs(float(cut.float().mean()) - 0.5) < 0.05
    lengths = known[cut].sum(-1)
    assert bool((known[cut] == (torch.arange(4) < lengths[:, None])).all())
    # The chunk is told the share of its clean tokens, as by the sampler "commit"; the others keep their time.
    assert torch.equal(times[cut], lengths / 4) and bool((times[~cut] == 0.3).all())
    # Every place is asked for, none is cut off entirely, and all cuts are as likely.
    torch.testing.assert_close(
        torch.bincount(lengths, minlength=5)[:4] / len(lengths), torch.full((4,), 0.25), atol=0.05, rtol=0
    )
    assert int(lengths.max()) == 3


def test_tokens_that_are_known_anyway_cost_nothing(tmp_path, monkeypatch):
    net = model(token_loss_max_time=0.2, block_sizes=[1])
    trainer = denoiser_trainer(tmp_path, net)
    ids = torch.randint(0, 50, (2, 16))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "latents": net.encode(ids)}
    seen = []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda *a, **k: (seen.append((a, k)), forward(*a, **k))[1])
    loss = trainer.compute_loss(net, inputs)
    (x, t), given = seen[0]
    asked = given.pop("token_mask")
    known = given["token_times"] >= 0.2
    assert (
        bool((asked == ~known & (torch.arange(8).view(2, 4, 1) < 7)).all()) and bool(asked.any()) and bool(known.any())
    )
    hidden = forward(x, t, **given).token_hidden
    each = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, net.token_head()).flatten(0, 2), ids.flatten(), reduction="none"
    ).view(2, 4, 4)
    torch.testing.assert_close(loss, each[asked].sum() / (7 * 4))
    # Nothing to ask for: no loss, yet a gradient for everybody, as processes that train together expect.
    net.config.token_loss_max_time = 1e-9
    nothing = trainer.compute_loss(net.train(), inputs)
    nothing.backward()
    trained = [p for p in net.denoiser.parameters() if p.requires_grad]
    assert nothing.item() == 0 and all(p.grad is not None and p.grad.abs().max() == 0 for p in trained)
    with pytest.raises(ValueError, match="pass only_tokens=True"):
        net(x, t, **given | {"token_mask": asked, "only_tokens": False})


def test_settings_without_token_times_are_refused():
    for wrong in ({"token_cut_rate": 0.5}, {"token_loss_max_time": 0.5}):
        with pytest.raises(ValueError, match="set token_time_std > 0"):
            joint(**wrong)


def test_single_chunks_waste_no_first_block():
    plan = plan_blocks(6, model(block_sizes=[1]).config, torch.Generator().manual_seed(0))
    assert plan.index.tolist() == list(range(6)) and plan.context and not plan.clean_first


def test_copies_of_a_row_share_their_context_and_ask_for_every_token(tmp_path):
    net = model(token_cut_rate=1.0, noise_copies=4)
    times, asked, _ = draw_token_times(torch.full((3 * 4, 5), 0.3), net.config, torch.Generator().manual_seed(0))
    known = (times > 0.999).view(3, 4, 5, 4)
    asked = asked.view(3, 4, 5, 4)
    assert bool((asked.sum(1) == 1).all()) and bool((asked.sum(-1) == 1).all())
    assert bool((known.sum(-1) == asked.float().argmax(-1)).all())
    # Without a cut, too, no token is asked for by two copies, and none whose time is late.
    net.config.token_cut_rate, net.config.token_loss_max_time = 0.5, 0.2
    times, asked, _ = draw_token_times(torch.full((300 * 4, 5), 0.3), net.config, torch.Generator().manual_seed(0))
    asked, times = asked.view(300, 4, 5, 4), times.view(300, 4, 5, 4)
    assert int(asked.sum(1).max()) == 1 and int(asked.sum(-1).max()) == 1
    assert float(times[asked].max()) < 0.2
    uncut = ((times > 2e-4) & (times < 0.999)).any(-1)
    assert 0.4 < float(uncut.float().mean()) < 0.6 and bool(asked[uncut].any())
    net.config.token_cut_rate, net.config.token_loss_max_time = 1.0, 1.0
    # A batch of copies is the same rows, each on its own, beside their own context.
    clean, x, t = torch.randn(2, 6, 32), torch.randn(2 * 3, 6, 32), torch.rand(2 * 3, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).repeat_interleave(3, 0)
    together = net(x, t, context=clean, block_index=INDEX, attention_mask=mask).token_hidden
    for row in range(6):
        alone = net(
            x[row : row + 1], t[row : row + 1], context=clean[row // 3 : row // 3 + 1], block_index=INDEX,
            attention_mask=mask[row : row + 1],
        )  # fmt: skip
        real = mask[row].bool()
        torch.testing.assert_close(together[row, real], alone.token_hidden[0, real], atol=1e-5, rtol=1e-5)
    denoiser_trainer(tmp_path, net).train()
    with pytest.raises(ValueError, match="noise_copies must be 1, or more with"):
        joint(noise_copies=2)


def test_a_model_knows_how_it_is_best_sampled(monkeypatch):
    net = model(sampler="commit", block_size=2)
    calls = []
    finish = net.denoiser.finish
    monkeypatch.setattr(net.denoiser, "finish", lambda *a, **k: (calls.append("block"), finish(*a, **k))[1])
    commit = net._commit
    monkeypatch.setattr(net, "_commit", lambda *a: (calls.append("commit"), commit(*a))[1])
    net.generate(num_chunks=4)
    assert calls == ["commit", "block", "commit"]
    calls.clear()
    net.generate(num_chunks=4, block_size=0, sampler="euler", num_steps=2)
    assert calls == []
    with pytest.raises(ValueError, match="block_size must not be negative"):
        net.generate(num_chunks=4, block_size=-1)
    for wrong in ({"sampler": "commit"}, {"block_size": -1}):
        with pytest.raises(ValueError, match="needs token_time_std > 0; got"):
            joint(**wrong)


@pytest.mark.parametrize("num_context_layers", [0, 2])
def test_the_next_token_loss_is_that_of_what_commit_draws_from(monkeypatch, num_context_layers):
    denoiser = SHAPE | {"attention": "block_causal", "num_context_layers": num_context_layers}
    net = model(denoiser=denoiser)
    ids, mask = torch.randint(0, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 6:] = 0
    losses = []

    def read(hidden, head, temperature, generator):
        """In place of drawing: notes how likely the true token was, and goes on with it."""
        place = len(losses)
        losses.append(-torch.nn.functional.linear(hidden[:, 0], head).log_softmax(-1)[torch.arange(2), ids[:, place]])
        return ids[:, place : place + 1]

    monkeypatch.setattr(net.vae, "read_tokens", read)
    net._noise = lambda shape, generator: torch.zeros(shape)
    net.generate(num_chunks=3, batch_size=2, num_steps=4, sampler="commit", block_size=1)
    expected = torch.stack(losses, dim=1)
    counted = mask.bool() & (torch.arange(12) > 0)
    assert abs(next_token_loss(net, ids, mask) - float(expected[counted].mean())) < 1e-4


def test_training_tells_a_cut_chunk_what_commit_tells_it(tmp_path, monkeypatch):
    net = model(token_cut_rate=1.0, noise_copies=4, block_sizes=[1])
    told: list[torch.Tensor] = []
    forward = net.denoiser.forward
    monkeypatch.setattr(net.denoiser, "forward", lambda x, t, **more: (told.append(t), forward(x, t, **more))[1])
    ids = torch.randint(0, 50, (3, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "latents": net.encode(ids)}
    denoiser_trainer(tmp_path, net).compute_loss(net, inputs)
    assert told[0].shape == (12, 6) and told[0].unique().tolist() == [0.0, 0.25, 0.5, 0.75]
    told.clear()
    net.generate(num_chunks=1, sampler="commit", num_steps=4)
    assert torch.cat(told).flatten().tolist() == [0.0, 0.25, 0.5, 0.75]


def test_commit_looks_at_no_token_but_those_it_draws(monkeypatch):
    net = model(sampler="commit", block_size=2)
    asked: list[int] = []
    forward = type(net).forward

    def watched(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        asked.append(output.token_hidden.shape[0])
        return output

    monkeypatch.setattr(type(net), "forward", watched)
    net.generate(num_chunks=6, batch_size=3, num_steps=4)
    assert asked == [3 * 2] * 4 * 3, "rows · chunks of a block, in each of four passes over three blocks"
    asked.clear()
    net.generate(num_chunks=6, batch_size=3, num_steps=2)
    assert asked == [3 * 2 * 2] * 2 * 3
