"""Ids drawn from logits."""

import torch

from tokcom_hf.metrics.token_sampling import sample_tokens


def test_frequencies_are_the_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(3, 11) * 2
    logits[:, [0, 4, 10]] = torch.finfo(torch.float32).min
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).softmax(-1)
        drawn = sample_tokens(logits.expand(20_000, 3, 11), temperature, torch.Generator().manual_seed(1))
        assert drawn.shape == (20_000, 3) and drawn.dtype == torch.long
        seen = torch.nn.functional.one_hot(drawn, 11).float().mean(0)
        torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)
        assert bool((seen[:, [0, 4, 10]] == 0).all())


def test_greedy_and_seeds():
    logits = torch.randn(5, 7, 13)
    assert torch.equal(sample_tokens(logits, 0.0), logits.argmax(-1))
    draw = lambda seed: sample_tokens(logits, 1.0, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert sample_tokens(logits.bfloat16()).shape == (5, 7)
