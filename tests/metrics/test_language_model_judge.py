"""A causal language model as judge: perplexity per token, in pieces and batches, whatever the padding."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.evaluation.language_model_judge import LanguageModelJudge, packaged_gguf
from tokcom_hf.metrics.compute import matching_llama_config

TEXTS = ["the quick brown fox", "a lazy dog and the quick brown fox jumps over it", "fox"]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 5, 280)
    config = matching_llama_config(30_000, len(tokenizer), num_layers=1, head_dim=16)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval(), tokenizer


def by_hand(model, tokenizer, pieces: list[list[int]]) -> float:
    losses = []
    for piece in pieces:
        ids = torch.tensor([[tokenizer.eos_token_id, *piece]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-log_probs.gather(-1, ids[0, 1:, None])[:, 0]).tolist()
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_per_token_over_all_texts_whatever_the_batch(parts):
    model, tokenizer = parts
    judge = LanguageModelJudge(model, tokenizer)
    expected = by_hand(model, tokenizer, [tokenizer(text).input_ids for text in TEXTS])
    for batch_size in (1, 2, 8):
        assert judge.perplexity(TEXTS, batch_size) == pytest.approx(expected, rel=1e-4)
    assert judge.perplexity(TEXTS[:1]) != pytest.approx(expected, rel=1e-3)


def test_long_texts_are_read_in_pieces(parts):
    model, tokenizer = parts
    ids = tokenizer(TEXTS[1]).input_ids
    pieces = [ids[begin : begin + 4] for begin in range(0, len(ids), 4)]
    judge = LanguageModelJudge(model, tokenizer, length=5)
    assert judge.perplexity(TEXTS[1:2]) == pytest.approx(by_hand(model, tokenizer, pieces), rel=1e-4)
    with pytest.raises(ValueError, match="no token"):
        judge.perplexity([""])


def test_a_judge_is_a_folder_or_a_package_that_carries_a_gguf_file(parts, tmp_path, monkeypatch):
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    loaded = LanguageModelJudge.from_pretrained(str(tmp_path / "judge"))
    assert loaded.perplexity(TEXTS) == pytest.approx(LanguageModelJudge(model, tokenizer).perplexity(TEXTS), rel=1e-5)
    (tmp_path / "llm_toy").mkdir()
    (tmp_path / "llm_toy" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_gguf("llm-toy") is None
    (tmp_path / "llm_toy" / "toy.gguf").write_bytes(b"GGUF")
    assert packaged_gguf("llm-toy") == tmp_path / "llm_toy" / "toy.gguf"
    assert packaged_gguf("somebody/judge") is None and packaged_gguf(str(tmp_path / "judge")) is None
