"""Tokens that look at single tokens of finished chunks."""

import pytest
import torch

from tokcom_hf import DenoisedModelConfig, TokComConfig, TokComVAEConfig
from tokcom_hf.models.token_attention import TokenAttention

BATCH, CHUNKS, PLACES, TOKEN, HIDDEN = 2, 5, 4, 6, 32
INDEX = torch.tensor([0, 1, 2, 2, 3])


def attention() -> TokenAttention:
    torch.manual_seed(0)
    config = DenoisedModelConfig(latent_size=PLACES * TOKEN, hidden_size=16, num_attention_heads=2)
    config._attn_implementation = "sdpa"
    return TokenAttention(config, PLACES, HIDDEN, num_heads=4)


def draw(copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.randn(BATCH, CHUNKS, PLACES * TOKEN)
    return clean, torch.randn(copies * BATCH, CHUNKS, PLACES, HIDDEN)


def everyone(hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(hidden.shape[:-1], dtype=torch.bool)


def read(module: TokenAttention, hidden, key_value, **where) -> torch.Tensor:
    """What all tokens read, (batch, chunks, places, hidden)."""
    return module(hidden.flatten(0, -2), key_value, everyone(hidden), **where).view_as(hidden)


def test_a_token_sees_the_tokens_of_the_blocks_before_its_own():
    module = attention()
    clean, hidden = draw()
    before = read(module, hidden, module.key_value(clean), block_index=INDEX)
    # Nobody stands before the first block: it reads the key without a value.
    assert before[:, 0].abs().max() == 0
    assert before[:, 1].abs().min() > 0
    for chunk, place, expected in ((0, 3, [1, 2, 3, 4]), (1, 0, [2, 3, 4]), (2, 1, [4]), (4, 0, [])):
        other = clean.clone()
        other[:, chunk, place * TOKEN] += 1.0
        changed = (read(module, hidden, module.key_value(other), block_index=INDEX) - before).abs().amax((0, 2, 3))
        assert changed.gt(1e-7).nonzero().flatten().tolist() == expected, (chunk, place)


def test_a_key_is_made_of_a_token_and_those_left_of_it():
    module = attention()
    clean, _ = draw()
    key, value = module.key_value(clean)
    other = clean.clone()
    other[:, 1, 2 * TOKEN] += 1.0
    for part, now in zip((key, value), module.key_value(other)):
        assert part.shape == (BATCH, 4, 1 + CHUNKS * PLACES, HIDDEN // 4)
        assert part[:, :, 0].abs().max() == 0
        assert (now - part).abs().amax((0, 1, 3)).gt(0).nonzero().flatten().tolist() == [7, 8, 9, 10]
    # The same tokens give the same value whatever their places: one map for all.
    tokens = torch.randn(1, CHUNKS * PLACES, TOKEN)
    _, here = module.key_value(tokens.view(1, CHUNKS, -1))
    _, shifted = module.key_value(tokens.roll(1, dims=1).view(1, CHUNKS, -1))
    torch.testing.assert_close(here[:, :, 5:-1], shifted[:, :, 6:])


def test_chunks_finished_one_after_the_other_have_the_keys_of_all_at_once():
    module = attention()
    clean, _ = draw()
    whole = module.key_value(clean)
    for start in (1, 3):
        part = module.key_value(clean[:, start : start + 2], start, clean[:, start - 1 : start])
        for one, other in zip(whole, part):
            torch.testing.assert_close(one[:, :, 1 + start * PLACES :][:, :, : 2 * PLACES], other)


@pytest.mark.parametrize("ragged", [False, True])
def test_copies_of_a_row_read_what_each_would_alone(ragged):
    module = attention()
    clean, hidden = draw(copies=3)
    key_value = module.key_value(clean)
    mask = torch.rand(hidden.shape[:-1]) < 0.4 if ragged else everyone(hidden)
    assert not ragged or mask.flatten(1).sum(1).unique().numel() > 1
    together = module(hidden[mask], key_value, mask, block_index=INDEX)
    alone = torch.zeros_like(hidden)
    for copy in range(3):
        part = torch.arange(BATCH) * 3 + copy
        alone[part] = read(module, hidden[part], key_value, block_index=INDEX)
    torch.testing.assert_close(together, alone[mask])


def test_padding_is_not_read():
    module = attention()
    clean, hidden = draw()
    mask = torch.ones(BATCH, CHUNKS, dtype=torch.long)
    mask[0, :2] = 0
    masked = read(module, hidden, module.key_value(clean, attention_mask=mask), attention_mask=mask)
    # Rotary positions are relative: the row without its padding, further left, reads the same.
    short = read(module, hidden[:1, 2:], module.key_value(clean[:1, 2:]))
    torch.testing.assert_close(masked[0, 2:], short[0])
    torch.testing.assert_close(masked[1], read(module, hidden, module.key_value(clean))[1])


def test_eager_attention_reads_the_same():
    module = attention()
    clean, hidden = draw()
    rows = []
    for name in ("sdpa", "eager"):
        module.config._attn_implementation = name
        rows.append(read(module, hidden, module.key_value(clean), block_index=INDEX))
    torch.testing.assert_close(*rows)


def config(**flow) -> TokComConfig:
    vae = TokComVAEConfig(
        encoder="embedding", nearest_decoder=True, latent_size=16, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    denoiser = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attention": "block_causal"}
    flow = {"clean_latents": "posterior_mean", "train_embeddings": True, "denoiser": denoiser} | flow
    return TokComConfig(vae=vae, **flow)


def test_configs_that_cannot_be():
    assert config(token_attention_heads=4).token_attention_heads == 4
    with pytest.raises(ValueError, match="even multiple of token_attention_heads, got 32 and 5"):
        config(token_attention_heads=5)
    with pytest.raises(ValueError, match="even multiple of token_attention_heads, got 32 and -2"):
        config(token_attention_heads=-2)
    bidirectional = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match="tokens of finished chunks; got 'posterior_mean' and 'bidirectional'"):
        config(token_attention_heads=4, denoiser=bidirectional)
    with pytest.raises(ValueError, match="set token_attention_heads; got 8 and 0"):
        config(token_mlp_size=8)
    with pytest.raises(ValueError, match="reads: set token_attention_heads; got -8 and 4"):
        config(token_mlp_size=-8, token_attention_heads=4)
