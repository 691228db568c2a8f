"""Draws of a TokCom model beside those of its own context."""

import numpy as np
import pytest
import torch

from tests.helpers.tokcom_tools import seeded, small
from tokcom_hf.evaluation.text_generation import HeadSampler
from tokcom_hf.evaluation.tokcom_exactness import ContextSampler, against_context


@pytest.fixture(scope="module")
def model():
    """Its context is sure of some tokens, so that draws which miss them are told."""
    model = small("posterior")
    with torch.no_grad():
        model.context.heads.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def prefixes():
    return torch.randint(0, 50, (20, 6), generator=seeded(1)).numpy()


def test_draws_of_the_context_are_exact_and_those_of_the_heads_are_not(model, prefixes):
    exact = against_context(model, prefixes, ContextSampler(model).continuations(prefixes, 200, 4, seed=3))
    heads = against_context(model, prefixes, HeadSampler(model).continuations(prefixes, 200, 4, seed=3))
    for key in ("excess", "hits"):
        for place in range(4):
            assert abs(exact[key][place]) < 4 * exact[key + "_error"][place]
    # The first token follows the text alone, as all heads do; later heads do not know the tokens before.
    assert abs(heads["excess"][0]) < 4 * heads["excess_error"][0]
    assert min(heads["excess"][1:]) > 0.1 and max(heads["hits"][1:]) < -1


def test_figures_are_those_of_the_definition(model, prefixes):
    drawn = torch.randint(0, 50, (20, 3, 4), generator=seeded(2)).numpy()
    found = against_context(model, prefixes, drawn, batch_size=7)
    excess, hits = np.zeros((20, 3, 4)), np.zeros((20, 3, 4))
    for row in range(20):
        for draw in range(3):
            for place in range(4):
                before = torch.from_numpy(np.concatenate([prefixes[row], drawn[row, draw, :place]]))[None]
                with torch.no_grad():
                    p = model.context.head_logits(model.context(before)[0, -1])[0].double().softmax(-1).numpy()
                token = p[drawn[row, draw, place]]
                excess[row, draw, place] = -np.log(token) + (p * np.log(p.clip(1e-300))).sum()
                hits[row, draw, place] = 100 * (token - (p**2).sum())
    for key, each in (("excess", excess), ("hits", hits)):
        np.testing.assert_allclose(found[key], each.mean(axis=(0, 1)), rtol=1e-3, atol=1e-4)
        error = each.mean(axis=1).std(axis=0, ddof=1) / 20**0.5
        np.testing.assert_allclose(found[key + "_error"], error, rtol=1e-3, atol=1e-4)
    alone = against_context(model, prefixes[:1], drawn[:1])
    np.testing.assert_allclose(alone["hits"], hits[0].mean(axis=0), rtol=1e-3, atol=1e-4)
    assert alone["excess_error"] is None and alone["hits_error"] is None


def test_draws_are_those_of_their_seed(model, prefixes):
    one = ContextSampler(model).continuations(prefixes, 2, 4, seed=5)
    assert one.shape == (20, 2, 4)
    assert np.array_equal(one, ContextSampler(model).continuations(prefixes, 2, 4, seed=5))
    assert not np.array_equal(one, ContextSampler(model).continuations(prefixes, 2, 4, seed=6))
    assert one.max() < model.config.vae.omni_token_id
