"""Codes and token ids: exact for every id, in every dtype."""

import pytest
import torch

from tests.helpers.lfq_tools import OLD, language_model
from tokcom_hf import (
    LFQExpandedConfig,
    LFQExpandedModel,
    decode_tokens_to_lfq_codes,
    encode_lfq_codes_to_tokens,
    expand_vocab_for_lfq,
    get_lfq_token_range,
)
from tokcom_hf.models.lfq_rows import initialize_rows

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
def test_all_65536_ids_round_trip(dtype, signed):
    ids = torch.arange(32000, 32000 + 2**16).view(256, 256)
    codes = decode_tokens_to_lfq_codes(ids, 32000, 16, dtype=dtype)
    assert codes.shape == (256, 256, 16) and codes.dtype == dtype and set(codes.unique().tolist()) == {0, 1}
    given = codes * 2 - 1 if signed else codes
    back = encode_lfq_codes_to_tokens(given, 32000, 16)
    assert back.dtype == torch.int64 and torch.equal(back, ids)


def test_golden_vectors():
    # id − start = 5 = 0b0101: bits 0 and 2, least significant first.
    assert decode_tokens_to_lfq_codes(torch.tensor([[105]]), 100, 4).tolist() == [[[1, 0, 1, 0]]]
    assert encode_lfq_codes_to_tokens(torch.tensor([[[1, 0, 1, 0]]]), 100, 4).tolist() == [[105]]
    assert encode_lfq_codes_to_tokens(torch.tensor([[[-0.3, -1.0, 0.0, 2e-6]]]), 100, 4).tolist() == [[108]]
    assert encode_lfq_codes_to_tokens(torch.tensor([[[False, True]]]), 7, 2).tolist() == [[9]]
    assert decode_tokens_to_lfq_codes(torch.tensor([[2**24 - 1 + 9]], dtype=torch.int32), 9, 24).sum() == 24


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 3, 4), (0, 7), ()])
def test_leading_shapes_are_kept(shape):
    ids = torch.randint(10, 10 + 2**6, shape)
    codes = decode_tokens_to_lfq_codes(ids, 10, 6)
    assert codes.shape == (*shape, 6) and torch.equal(encode_lfq_codes_to_tokens(codes, 10, 6), ids)


@pytest.mark.parametrize("bad", [99, 116, -1])
def test_an_id_outside_the_range_is_named(bad):
    with pytest.raises(ValueError, match=rf"1 of 2 token ids are no LFQ tokens: these are 100 … 115.*{bad}"):
        decode_tokens_to_lfq_codes(torch.tensor([[100, bad]]), 100, 4)


def test_wrong_width_dtype_and_dimension():
    with pytest.raises(ValueError, match=r"output_dim=16 bits, got shape \(1, 2, 15\)"):
        encode_lfq_codes_to_tokens(torch.zeros(1, 2, 15), 0, 16)
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        encode_lfq_codes_to_tokens(torch.tensor(1.0), 0, 1)
    with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
        decode_tokens_to_lfq_codes(torch.tensor([1.0]), 0, 4)


@pytest.mark.parametrize("output_dim", [0, -1, 25, 4.0, True, "16"])
def test_output_dim_out_of_range(output_dim):
    calls = (
        lambda: LFQExpandedConfig(output_dim=output_dim),
        lambda: expand_vocab_for_lfq(language_model("llama"), {"output_dim": output_dim}),
        lambda: encode_lfq_codes_to_tokens(torch.zeros(1, 1, 4), 0, output_dim),
        lambda: decode_tokens_to_lfq_codes(torch.zeros(1, 1, dtype=torch.long), 0, output_dim),
    )
    for call in calls:
        with pytest.raises(Exception, match="output_dim") as caught:
            call()
        assert "24" in str(caught.value) or "validation error" in str(caught.value).lower()


def test_the_range_of_plain_expanded_and_merged_models():
    base = language_model("llama")
    assert get_lfq_token_range(base, {"output_dim": 6}) == (OLD, OLD + 64)
    assert get_lfq_token_range(base) == (OLD, OLD + 65536)
    model = expand_vocab_for_lfq(base, {"output_dim": 6}, "mean", 0.01, False)
    assert isinstance(model, LFQExpandedModel) and not model.config.freeze_original
    assert get_lfq_token_range(model) == get_lfq_token_range(model, {"output_dim": 6}) == (OLD, OLD + 64)
    with pytest.raises(ValueError, match="6 bits, but lfq_config says 7"):
        get_lfq_token_range(model, {"output_dim": 7})
    assert get_lfq_token_range(model.merge_and_unload()) == (OLD, OLD + 64)
    with pytest.raises(ValueError, match="output_dim"):
        get_lfq_token_range(language_model("llama"), {"bits": 7})


def test_initial_rows():
    torch.manual_seed(0)
    old, rows = torch.randn(500, 64) + 3.0, torch.full((256, 64), 9.0)
    initialize_rows(rows, old, "random", 0.02, 8)
    assert abs(rows.std() - 0.02) < 1e-3 and abs(rows.mean()) < 1e-3
    initialize_rows(rows, old, "mean", 0.02, 8)
    torch.testing.assert_close(rows.mean(0), old.mean(0), atol=1e-5, rtol=0)
    assert abs((rows - rows.mean(0)).std() - 0.02) < 3e-3 and len(rows.unique(dim=0)) == 256
    # One bit apart is closer than all eight apart.
    assert (rows[0] - rows[1]).norm() < (rows[0] - rows[255]).norm()
    initialize_rows(rows, old, "zeros", 0.02, 8)
    assert not rows.any()
