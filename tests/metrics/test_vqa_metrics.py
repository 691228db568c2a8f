"""VQA accuracy, BLEU and the paired bootstrap against values worked out by hand."""

import pytest

from tokcom_hf.metrics.vqa import accuracy_by_type, bleu, normalize_answer, paired_bootstrap, vqa_accuracy


def test_answers_are_normalised_and_scored():
    assert normalize_answer(" The Two  dogs. ") == "2 dogs"
    assert vqa_accuracy(["A red", "blue"], [["red"], ["green"]]) == [1.0, 0.0]
    ten = ["cat"] * 2 + ["dog"] * 8
    # Leaving one "cat" out leaves 1 match (1/3), leaving a "dog" out leaves 2 (2/3): (2·1/3 + 8·2/3) / 10.
    assert vqa_accuracy(["cat"], [ten])[0] == pytest.approx(0.6)
    assert vqa_accuracy(["dog"], [ten])[0] == 1.0
    assert accuracy_by_type([1, 0, 1], ["a", "a", "b"]) == {"a": 0.5, "b": 1.0, "all": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="non-empty reference"):
        vqa_accuracy(["a"], [[]])


def test_bleu_of_a_known_pair():
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100.0)
    # 5 of 6 unigrams, 3 of 5 bigrams, 2 of 4 trigrams, 1 of 3 4-grams.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["the cat sat on a mat"], [["the cat sat on the mat"]]) == pytest.approx(expected)
    assert bleu(["a b"], [["c d"]]) == 0.0


def test_bootstrap_finds_a_clear_difference_and_none_where_there_is_none():
    clear = paired_bootstrap([1.0] * 80 + [0.0] * 20, [0.0] * 50 + [1.0] * 30 + [0.0] * 20, 500)
    assert clear["low"] > 0.3 and clear["difference"] == pytest.approx(0.5) and clear["p_not_better"] == 0
    same = paired_bootstrap([1.0, 0.0] * 50, [0.0, 1.0] * 50, 500)
    assert same["low"] < 0 < same["high"]
