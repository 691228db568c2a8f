"""Usage is counted from indices, exactly."""

import math

import pytest
import torch

from tokcom_hf.metrics.codebook import CodebookMonitor, codebook_usage, utilization_ceiling


def test_usage_of_a_known_index_map():
    codes = torch.tensor([[[0, 0, 5], [5, 9, 9]], [[2, 2, 2], [2, 2, 2]]])
    usage = codebook_usage(codes, 16)
    shares = [2 / 12, 2 / 12, 2 / 12, 6 / 12]
    entropy = -sum(share * math.log(share) for share in shares)
    assert usage["active"] == 4 and usage["utilization"] == 0.25
    assert usage["entropy"] == pytest.approx(entropy) and usage["perplexity"] == pytest.approx(math.exp(entropy))
    assert usage["normalized_entropy"] == pytest.approx(entropy / math.log(16))


def test_all_codes_once_is_full_use():
    usage = codebook_usage(torch.randperm(512), 512)
    assert usage["utilization"] == 1 and usage["normalized_entropy"] == pytest.approx(1)


def test_one_hot_and_out_of_range_codes_are_refused():
    with pytest.raises(TypeError, match="integer"):
        codebook_usage(torch.eye(8), 8)
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        codebook_usage(torch.tensor([8]), 8)
    with pytest.raises(ValueError, match="no codes"):
        codebook_usage(torch.empty(0, dtype=torch.long), 8)


def test_ceiling_matches_simulation():
    drawn = [len(torch.randint(100, (150,)).unique()) / 100 for _ in range(200)]
    assert utilization_ceiling(150, 100) == pytest.approx(sum(drawn) / 200, abs=0.02)


def test_monitor_separates_batch_window_and_average():
    monitor = CodebookMonitor(4, window=2, decay=0.5)
    for counts in ([4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]):
        monitor.update(torch.tensor(counts))
    report = monitor.report()
    assert report["batch_utilization"] == 0.25 and report["window_utilization"] == 0.5
    assert report["cumulative_active"] == 3 and report["batch_utilization_ceiling"] == pytest.approx(1 - 0.75**4)
    copy = CodebookMonitor(4, window=2, decay=0.5)
    copy.load_state_dict(monitor.state_dict())
    assert copy.report() == report
