"""`TokComModel.forward`: the losses of stage two against their formulas, and what each block may see."""

import pytest
import torch

from tests.helpers.tokcom_tools import seeded, small
from tokcom_hf.models.tokcom_flow_matching import MIN_REMAINING

WEIGHTS = {"mse_weight": 0.7, "cross_entropy_weight": 0.3}
BLOCKED = {"noise_draws": 2, "head_weight": 0.6, "context_dropout": 0.2, "block_sizes": [1, 2]}


@pytest.fixture(scope="module")
def documented():
    return small("tokcom", standardize_latents=True, clean_prefix=True, **WEIGHTS)


@pytest.fixture(scope="module")
def blocked():
    return small("context", standardize_latents=True, **WEIGHTS, **BLOCKED)


@pytest.fixture(scope="module")
def batch():
    """Three rows of 16 tokens; the second ends within a chunk, of the third only five tokens are left."""
    ids, mask = torch.randint(0, 50, (3, 16), generator=seeded(1)), torch.ones(3, 16, dtype=torch.long)
    mask[1, 10:] = mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean nats of the counted tokens."""
    nats = -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return nats[counted].mean()


def reference(model, ids, mask, noise, timesteps, starts, size, context_mask=None) -> dict[str, torch.Tensor]:
    """The formulas, block by block: noise and timesteps as forward takes them, `starts` the blocks of one draw."""
    config, chunk = model.config, model.config.vae.chunk_size
    errors, velocities, logits, labels, counted, predictions = [], [], [], [], [], []
    for row in range(len(ids)):
        for number in range(noise.shape[1]):
            start = starts[number % len(starts)]
            own = slice(start, start + size * chunk)
            tokens, real = ids[row, own], mask[row, own].bool().view(size, chunk)
            x1 = model.standardize(model.encode(tokens[None]))[0]
            x0, t = noise[row, number], timesteps[row, number].expand(size)
            x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
            condition = None
            if model.context is not None:
                condition = model.context(ids[row : row + 1, :start])[:, -1]
                if context_mask is not None and not context_mask[row, number]:
                    condition = torch.zeros_like(condition)
            seen = real.any(-1)
            attention = None if bool(seen.all()) or not bool(seen.any()) else seen[None].long()
            clean = model.denoiser(x_t[None], t[None], context=condition, attention_mask=attention).clean_latents[0]
            predictions.append(clean)
            used = seen & (t < 1)
            error = (clean - x1).square().mean(-1)
            errors.append(error[used])
            velocities.append((error / (1 - t).clamp(min=MIN_REMAINING).square())[used])
            hidden = model.vae.decode_hidden(model.unstandardize(clean))
            logits.append((hidden @ model.vae.lm_head.weight.T).flatten(0, 1))
            labels.append(tokens)
            counted.append((real & used[:, None]).flatten())
    parts = {
        "mse_loss": torch.cat(errors).mean(),
        "flow_loss": torch.cat(velocities).mean(),
        "cross_entropy_loss": cross_entropy(torch.cat(logits), torch.cat(labels), torch.cat(counted)),
        "clean_latents": torch.stack(predictions).view_as(noise),
    }
    loss = config.mse_weight * parts["flow_loss"] + config.cross_entropy_weight * parts["cross_entropy_loss"]
    if model.context is not None:
        heads = model.context.heads.weight.view(chunk, -1, model.config.context.hidden_size)
        states = model.context(ids)

        def nats(state, head, token):
            # Over every row of the table, the start token's included.
            scores = model.context.model.embed_tokens.weight @ (heads[head] @ state)
            return -scores.log_softmax(-1)[token]

        real = mask.bool()
        following = [nats(states[r, i], 0, ids[r, i]) for r in range(len(ids)) for i in range(16) if real[r, i]]
        later = [
            nats(states[r, s], head, ids[r, s + head])
            for r in range(len(ids)) for s in starts for head in range(1, chunk) if real[r, s + head]
        ]  # fmt: skip
        parts["next_token_loss"], parts["later_token_loss"] = torch.stack(following).mean(), torch.stack(later).mean()
        loss = loss + config.head_weight * (parts["next_token_loss"] + 0.2 * parts["later_token_loss"])
    return parts | {"loss": loss}


def compare(output, expected: dict[str, torch.Tensor]) -> None:
    assert {name for name, value in output.items() if value is not None} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, atol=1e-5, rtol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 2])
def test_losses_without_a_context(documented, batch, prefix):
    noise, timesteps = torch.randn(3, 1, 4, 16, generator=seeded(2)), torch.rand(3, 1, generator=seeded(3))
    if prefix:
        timesteps = timesteps[..., None].repeat(1, 1, 4)
        timesteps[..., :prefix] = 1.0
    output = documented(**batch, noise=noise, timesteps=timesteps)
    compare(output, reference(documented, *batch.values(), noise, timesteps, [0], 4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("offset", "size", "starts"), [(0, 1, [0, 4, 8, 12]), (3, 1, [3, 7, 11]), (5, 2, [5]), (0, 0, [0])]
)
def test_losses_of_blocks_behind_a_context(blocked, batch, offset, size, starts):
    shape = (3, 2 * len(starts), size or 4)
    noise, timesteps = torch.randn(*shape, 16, generator=seeded(2)), torch.rand(shape[:2], generator=seeded(3))
    hidden = torch.rand(shape[:2], generator=seeded(4)) < 0.6
    for context_mask in (None, hidden):
        arguments = {"noise": noise, "timesteps": timesteps, "context_mask": context_mask}
        output = blocked(**batch, **arguments, offset=offset, block_size=size)
        compare(output, reference(blocked, *batch.values(), noise, timesteps, starts, size or 4, context_mask))


@torch.no_grad()
def test_a_loss_of_weight_zero_is_not_computed(batch):
    output = small("tokcom", cross_entropy_weight=0.0, mse_weight=2.0)(**batch)
    assert output.cross_entropy_loss is None and torch.equal(output.loss, 2 * output.flow_loss)
    assert output.next_token_loss is None and output.later_token_loss is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["documented", "blocked"])
def test_without_the_loss_the_predictions_are_the_same(kind, request, batch):
    model, outputs = request.getfixturevalue(kind), []
    for wanted in (True, False):
        torch.manual_seed(0)
        outputs.append(model(**batch, return_loss=wanted))
    assert list(outputs[1]) == ["clean_latents"] and torch.equal(outputs[0].clean_latents, outputs[1].clean_latents)


@torch.no_grad()
def test_an_earlier_prediction_is_made_first():
    model = small("tokcom", denoiser=small("tokcom").config.denoiser.to_dict() | {"self_conditioning": True})
    ids = torch.randint(0, 50, (2, 8), generator=seeded())
    noise, timesteps = torch.randn(2, 1, 2, 16), torch.rand(2, 1)
    arguments = {"noise": noise, "timesteps": timesteps}
    x_t = ((1 - timesteps)[..., None, None] * noise + timesteps[..., None, None] * model.encode(ids)[:, None])[:, 0]
    first = model.denoiser(x_t, timesteps[:, 0]).clean_latents
    torch.testing.assert_close(model(ids, **arguments).clean_latents[:, 0], first)
    second = model.denoiser(x_t, timesteps[:, 0], self_condition=first).clean_latents
    torch.testing.assert_close(model(ids, **arguments, self_conditioned=True).clean_latents[:, 0], second)
    assert not torch.allclose(first, second)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["documented", "blocked"])
def test_padding_does_not_count(kind, request, batch):
    model = request.getfixturevalue(kind)
    options = {"block_size": 2} if kind == "blocked" else {}
    blocks = (3, 4, 2) if kind == "blocked" else (3, 1, 4)
    arguments = {"noise": torch.randn(*blocks, 16), "timesteps": torch.rand(blocks[:2]), **options}
    # Tokens of whole chunks of padding; those that share a chunk with text are part of its latent.
    other, mask = batch["input_ids"].clone(), batch["attention_mask"]
    other[1, 12:], other[2, 8:] = 7, 9
    first, second = (model(ids, mask, **arguments) for ids in (batch["input_ids"], other))
    for name in ("loss", "flow_loss", "mse_loss", "cross_entropy_loss", "next_token_loss", "later_token_loss"):
        assert (name in first) == (name in second)
        if name in first:
            torch.testing.assert_close(first[name], second[name], msg=name)
    unmasked = model(other, **arguments)
    assert not torch.allclose(unmasked.loss, second.loss)


@torch.no_grad()
def test_latents_of_a_file_equal_encoding(documented, blocked, batch):
    for model, options in ((documented, {}), (blocked, {"block_size": 2}), (blocked, {"block_size": 3})):
        outputs = []
        for latents in (None, model.encode(batch["input_ids"])):
            torch.manual_seed(0)
            outputs.append(model(**batch, latents=latents, **options))
        if options.get("block_size") == 3:
            # Blocks of three leave chunks of the row out, and fewer rows are multiplied in another order on several threads.
            for name in outputs[0]:
                torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-6, atol=1e-6)
        else:
            assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert outputs[0].clean_latents.shape == (3, 2, 3, 16)


@torch.no_grad()
def test_a_block_sees_only_tokens_before_it(blocked, batch):
    ids, arguments = batch["input_ids"], {"noise": torch.randn(3, 8, 1, 16), "timesteps": torch.full((3, 8), 0.3)}
    before = blocked(ids, **arguments, block_size=1).clean_latents
    for place in range(16):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 50
        after = blocked(other, **arguments, block_size=1).clean_latents
        for draw in range(2):
            same = [torch.equal(before[:, 4 * draw + b], after[:, 4 * draw + b]) for b in range(4)]
            # The block of the token itself is noisy latents of it.
            assert same[: place // 4] == [True] * (place // 4) and not any(same[place // 4 :]), place


@torch.no_grad()
def test_a_hidden_context_does_not_act(blocked, batch):
    arguments = {"noise": torch.randn(3, 8, 1, 16), "timesteps": torch.zeros(3, 8), "block_size": 1}
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 3] = mask[1, 6] = False
    ids = batch["input_ids"]
    other = (ids + 1) % 50
    one, two = (blocked(each, **arguments, context_mask=mask).clean_latents for each in (ids, other))
    same = (one == two).flatten(2).all(-1)
    # At t = 0 nothing else tells of the tokens; the first block of a text knows only the start token.
    first = torch.arange(8) % 4 == 0
    assert torch.equal(same, ~mask | first)


@torch.no_grad()
def test_noise_draws_share_the_context_and_follow_each_other(blocked, batch):
    read = []
    handle = blocked.context.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    noise, timesteps = torch.randn(3, 4, 2, 16), torch.rand(3, 4)
    both = blocked(**batch, noise=noise, timesteps=timesteps, block_size=2).clean_latents
    handle.remove()
    assert read == [(3, 17)]
    swapped = blocked(
        **batch, noise=noise[:, [2, 3, 0, 1]], timesteps=timesteps[:, [2, 3, 0, 1]], block_size=2
    ).clean_latents
    torch.testing.assert_close(swapped, both[:, [2, 3, 0, 1]])
    assert not torch.allclose(both[:, :2], both[:, 2:])


@torch.no_grad()
@pytest.mark.parametrize(("draws", "shift"), [(1, 0), (2, 2)])
def test_a_stride_leaves_blocks_out(draws, shift):
    model = small("context", noise_draws=draws).eval()
    ids = torch.randint(0, 50, (3, 20), generator=seeded(3))
    cuts = {"offset": 1, "draw_shift": shift, "block_size": 1}
    noise, timesteps = torch.randn(3, 4 * draws, 1, 16), torch.rand(3, 4 * draws)
    every = model(ids, noise=noise, timesteps=timesteps, **cuts).clean_latents.unflatten(1, (draws, 4))
    for stride, kept in ((2, [0, 2]), (3, [0, 3]), (9, [0])):
        chosen = torch.cat([torch.tensor(kept) + 4 * draw for draw in range(draws)])
        some = model(ids, noise=noise[:, chosen], timesteps=timesteps[:, chosen], **cuts, block_stride=stride)
        torch.testing.assert_close(some.clean_latents, every[:, :, kept].flatten(1, 2))


def test_what_is_drawn_follows_the_global_seed_and_the_configured_distribution():
    ids = torch.randint(0, 50, (2, 8), generator=seeded())
    model = small("tokcom", noise_std=0.0, time_distribution="logit_normal", time_mean=-9.0, time_std=0.1)
    told = []
    model.denoiser.register_forward_pre_hook(lambda module, args: told.append(args[:2]))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model(ids)
    assert torch.equal(told[0][1], told[1][1]) and not torch.equal(told[0][1], told[2][1])
    x_t, t = told[0]
    assert t.max() < 1e-3 and t.min() > 0
    torch.testing.assert_close(x_t, t[:, None, None] * model.encode(ids))


def test_rows_of_padding_and_of_nothing_to_predict_give_zero_gradients(documented, batch):
    nothing = documented(batch["input_ids"], torch.zeros(3, 16), timesteps=torch.rand(3, 1))
    clean = documented(batch["input_ids"], timesteps=torch.ones(3, 1))
    for output in (nothing, clean):
        documented.zero_grad()
        output.loss.backward()
        gradients = [p.grad for p in documented.denoiser.parameters()]
        assert output.loss.item() == 0
        assert all(g is not None and bool((g == 0).all()) for g in gradients)
    documented.zero_grad()


def test_the_vae_gets_no_gradient_of_the_flow(blocked, batch):
    blocked.zero_grad()
    blocked.vae.requires_grad_(False)
    blocked(**batch, block_size=2).loss.backward()
    assert all(p.grad is None for p in blocked.vae.parameters())
    parts = (blocked.denoiser, blocked.context)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for part in parts for p in part.parameters())
    blocked.vae.requires_grad_(True)
    blocked.zero_grad()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("tokcom", {"offset": 4}, "Without a context the whole row is one block"),
        ("tokcom", {"block_size": 1}, "Without a context the whole row is one block"),
        ("tokcom", {"block_stride": 2}, "Without a context the whole row is one block"),
        ("tokcom", {"input_ids": torch.zeros(1, 6).long()}, "multiple of 4"),
        ("context", {"block_size": 3}, "No block of 3 chunks of 4 tokens fits after 0 of 8"),
        ("context", {"offset": 6, "block_size": 1}, "fits after 6 of 8"),
        ("context", {"offset": 8}, "No block of 0 chunks"),
        ("context", {"offset": -4, "block_size": 1}, "fits after -4 of 8"),
        ("context", {"draw_shift": 2, "block_size": 1}, "this model has noise_draws=1"),
        ("context", {"block_stride": 0, "block_size": 1}, "block_stride must be at least 1, got 0"),
        (
            "context",
            {"offset": 4, "block_size": 1, "latents": torch.zeros(1, 2, 16)},
            "got offset=4, draw_shift=0 and block_stride=1",
        ),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(kind)(**{"input_ids": torch.zeros(1, 8).long(), **arguments})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (2, 15)), ("attention_mask", (1, 16)), ("noise", (1, 8, 1, 16)), ("noise", (2, 4, 1, 16)),
        ("noise", (2, 8, 1, 1)), ("timesteps", (2,)), ("timesteps", ()), ("timesteps", (2, 1)), ("timesteps", (2, 8, 2)),
        ("context_mask", (2, 1)), ("context_mask", (1, 8)), ("latents", (2, 3, 16)), ("latents", (2, 5, 16)),
        ("latents", (1, 4, 16)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(blocked, name, shape):
    with pytest.raises(ValueError, match=rf"{name} must be \(.* 8 blocks of 1 chunks are made; got"):
        blocked(torch.zeros(2, 16).long(), **{name: torch.ones(shape)}, block_size=1)


def test_a_mask_of_a_context_needs_one(documented):
    with pytest.raises(ValueError, match="this model has none"):
        documented(torch.zeros(2, 16).long(), context_mask=torch.ones(2, 1))
