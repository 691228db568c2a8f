"""The bit report counts from codes, and finds what is dead."""

import pytest
import torch

from tokcom_hf.metrics.lfq import bit_report, code_indices


def test_golden_indices_with_bit_0_least_significant():
    codes = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert code_indices(codes).tolist() == [1, 2, 4, 3, 7, 0]
    assert torch.equal(code_indices(2 * codes - 1), code_indices(codes.to(torch.bfloat16)))
    every = torch.arange(2**16)
    assert torch.equal(code_indices((every[:, None] >> torch.arange(16)) & 1), every)


def test_report_of_codes_worked_out_by_hand():
    # Bit 0: 1 1 0 0, bit 1 its opposite, bit 2 always 0, bit 3: 1 0 1 0.
    codes = torch.tensor([[[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]]])
    report = bit_report(codes)
    assert report["bit_mean"] == [0.5, 0.5, 0.0, 0.5]
    assert report["flip_rate"] == pytest.approx([1 / 3, 1 / 3, 0, 1])
    assert report["dead_bits"] == 1 and (report["bit_mean_min"], report["bit_mean_max"]) == (0.0, 0.5)
    assert report["max_correlation"] == pytest.approx(1.0)
    # One of the six pairs is fully correlated, all others not at all; the constant bit counts as uncorrelated.
    assert report["mean_correlation"] == pytest.approx(1 / 6, abs=1e-9)
    assert (report["tokens"], report["active"], report["utilization"]) == (4, 4, 4 / 16)
    assert report["utilization_ceiling"] == pytest.approx(1 - (15 / 16) ** 4)


@pytest.mark.parametrize(("share", "dead"), [(0.19, 1), (0.21, 0), (0.79, 0), (0.81, 1)])
def test_a_bit_is_dead_outside_a_fifth_and_four_fifths(share, dead):
    codes = torch.zeros(1, 100, 1)
    codes[0, : round(100 * share)] = 1
    assert bit_report(codes)["dead_bits"] == dead


def test_flips_are_counted_within_images_only():
    assert bit_report(torch.tensor([[[0], [0]], [[1], [1]]]))["flip_rate"] == [0.0]
    assert bit_report(torch.tensor([[[0]], [[1]]]))["flip_rate"] == [0.0]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(images, tokens, bits\), got shape \(4, 2\)"):
        bit_report(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="images, tokens, bits"):
        bit_report(torch.zeros(0, 4, 2))
