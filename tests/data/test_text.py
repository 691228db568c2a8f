"""Text in, packed rows out."""

import json

import numpy as np
import pytest
import torch

from tokcom_hf.data.packing import PackedTextDataset, StreamedTextDataset, pack, spread_offsets
from tokcom_hf.data.text import (
    embedded_documents,
    iterate_documents,
    load_documents,
    load_text_rows,
    split_documents,
    split_stream,
)
from tokcom_hf.data.tokenizers import EOS_TOKEN, check_tokenizer, load_tokenizer, train_tokenizer

SENTENCES = [f"Document {i}: the quick brown fox number {i} jumps over {i * i} lazy dogs." for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, 300)


# ------------------------------------------------------------------------------------------------------------- documents
def test_the_embedded_text_is_english_prose_in_a_fixed_order_and_bounded():
    documents = embedded_documents(1_000_000)
    size = sum(map(len, documents))
    assert 1_000_000 <= size < 1_100_000
    assert embedded_documents(1_000_000) == documents
    text = " ".join(documents).lower()
    assert text.count(" the ") > 1000 and text.count("def ") < text.count(" the ")


def test_where_python_is_trimmed_the_dependencies_speak(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = embedded_documents(200_000)
    assert sum(map(len, documents)) >= 200_000
    assert any("tensor" in text.lower() for text in documents)


def test_text_files_hold_documents_apart_by_blank_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffFirst line.\r\nSecond.\n\nStill the first.\n\n\nSecond document.\n\n\n\n  \n".encode())
    assert load_documents(str(file)) == ["First line.\nSecond.\n\nStill the first.", "Second document."]


def test_json_lines_hold_one_document_each_whatever_separators_they_contain(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one\u2028line separator", "two\n\n\nblank lines", "  ", "four"]
    file.write_text("\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in texts) + "\n\n")
    assert load_documents(str(file), text_column="body") == [texts[0], texts[1], texts[3]]
    assert load_documents(str(file), text_column="body", max_documents=1) == texts[:1]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.txt", None, FileNotFoundError, "does not exist"),
        ("empty.txt", b" \n\n\n ", ValueError, "corpus is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), ValueError, "not UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', ValueError, "line 2: not JSON"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "b"}', ValueError, "line 2: no text field 'text'"),
        ("number.jsonl", b'{"text": 3}', ValueError, "line 1: no text field"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_documents(str(tmp_path / name))


def test_bad_sources_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="either train_file or dataset_name"):
        load_documents("a.txt", "b")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_documents(str(tmp_path))
    with pytest.raises(ValueError, match="max_documents"):
        load_documents(max_documents=0)
    with pytest.raises(OSError, match=r"nothing' cannot be loaded"):
        load_documents(dataset_name=str(tmp_path / "nothing"))


@pytest.fixture
def hub_folder(tmp_path):
    """A local folder stands for a data set on the Hub: `datasets` reads both the same way."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.dumps({"content": text, "number": i}) for i, text in enumerate(SENTENCES)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_read_whole_or_as_a_stream(hub_folder, streaming):
    options = {"dataset_name": hub_folder, "streaming": streaming}
    assert load_documents(**options, text_column="content") == SENTENCES
    first = iterate_documents(**options, text_column="content", max_documents=5)
    assert list(first) == SENTENCES[:5]
    with pytest.raises(ValueError, match="has no column 'text'; it has content, number"):
        load_documents(**options)
    with pytest.raises(ValueError, match="holds int, not text"):
        load_documents(**options, text_column="number")


# ----------------------------------------------------------------------------------------------------------------- split
def test_the_split_is_by_documents_seeded_and_complete():
    train, held = split_documents(SENTENCES, 0.1, seed=3)
    assert len(held) == 6 and sorted(train + held) == sorted(SENTENCES)
    assert split_documents(SENTENCES, 0.1, seed=3) == (train, held)
    assert split_documents(SENTENCES, 0.1, seed=4)[1] != held
    with pytest.raises(ValueError, match=r"validation_share must be in \(0, 1\)"):
        split_documents(SENTENCES, 1.0, seed=0)


def test_one_long_document_is_split_without_losing_a_character():
    text = " ".join(SENTENCES)
    train, held = split_documents([text], 0.1, seed=0)
    assert sum(map(len, train)) + sum(map(len, held)) == len(text) and held


def test_a_stream_is_split_as_it_arrives():
    held: list[str] = []
    train = list(split_stream(iter(SENTENCES), 0.2, 0, held))
    assert sorted(train + held) == sorted(SENTENCES) and 3 <= len(held) <= 24
    again: list[str] = []
    assert list(split_stream(iter(SENTENCES), 0.2, 0, again)) == train and again == held


# ------------------------------------------------------------------------------------------------------------- tokenizers
def test_a_tokenizer_without_padding_token_pads_with_eos(tmp_path):
    tokenizer = train_tokenizer(["some text to learn from"] * 5, 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id and len(loaded) == len(tokenizer)
    assert loaded.pad([{"input_ids": [5, 6]}, {"input_ids": [7]}]).input_ids == [[5, 6], [7, loaded.eos_token_id]]


def test_a_trained_tokenizer_is_lossless_and_survives_saving(tokenizer, tmp_path):
    text = "Any  bytes:\t日本語 🦊 \n\n naïve café.  "
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == EOS_TOKEN
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (tokenizer.eos_token_id,) * 2 + (300,)


def test_tokenizer_errors_are_one_sentence(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(SENTENCES, 256)
    with pytest.raises(OSError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)

    class Config:
        omni_token_id = 299

    with pytest.raises(ValueError, match="has 300 tokens but the model was trained with 299"):
        check_tokenizer(tokenizer, Config())
    Config.omni_token_id = 300
    check_tokenizer(tokenizer, Config())


# --------------------------------------------------------------------------------------------------------------- packing
def test_rows_are_the_documents_with_eos_between_and_padding_only_at_the_end(tokenizer):
    rows = pack(SENTENCES, tokenizer, 32)
    expected = [token for text in SENTENCES for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    ids = torch.cat([row["input_ids"] for row in rows])
    mask = torch.cat([row["attention_mask"] for row in rows])
    assert ids[: len(expected)].tolist() == expected
    assert mask.tolist() == [1] * len(expected) + [0] * (-len(expected) % 32)
    assert set(ids[len(expected) :].tolist()) <= {tokenizer.pad_token_id}
    assert all(row["input_ids"].shape == (32,) and row["input_ids"].dtype == torch.long for row in rows)
    assert rows.token_ids.dtype == np.int32
    with pytest.raises(IndexError, match="of a data set of"):
        rows[len(rows)]


def test_offsets_cut_the_same_text_elsewhere():
    ids = np.arange(10, dtype=np.int32)
    rows = PackedTextDataset(ids, 4, 99, offsets=(0, 3))
    assert [row["input_ids"].tolist() for row in rows] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 99, 99], [3, 4, 5, 6], [7, 8, 9, 99],
    ]  # fmt: skip
    assert [int(row["attention_mask"].sum()) for row in rows] == [4, 4, 2, 4, 3]
    assert len(PackedTextDataset(ids[:2], 4, 99, offsets=(0, 3))) == 1


def test_enough_copies_put_a_chunk_border_before_every_token():
    offsets = spread_offsets(4, 64, 4, seed=1)
    assert offsets[0] == 0 and {offset % 4 for offset in offsets} == {0, 1, 2, 3}
    assert all(0 <= offset < 64 for offset in offsets)
    assert offsets == spread_offsets(4, 64, 4, seed=1) != spread_offsets(4, 64, 4, seed=2)
    with pytest.raises(ValueError, match="offset_copies"):
        spread_offsets(0, 64, 4, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_data_set_packs_every_document_once(tokenizer, workers):
    rows = StreamedTextDataset(lambda: SENTENCES, tokenizer, 32)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers)
    seen = torch.cat([row["input_ids"][row["attention_mask"].bool()] for row in loader])
    expected = pack(SENTENCES, tokenizer, 32).token_ids
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    if workers == 0:
        assert seen.tolist() == expected.tolist()
        assert sum(1 for _ in rows) == sum(1 for _ in rows)


def test_the_trainer_takes_a_streamed_data_set(tokenizer, tmp_path):
    from tokcom_hf import TokComVAE, TokComVAEConfig, TokComVAETrainer, TokComVAETrainingArguments

    config = TokComVAEConfig(
        vocab_size=len(tokenizer) + 1, latent_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=16,
    )  # fmt: skip
    arguments = TokComVAETrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=4, use_cpu=True, save_strategy="no",
        remove_unused_columns=False, sample_every=0, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    rows = StreamedTextDataset(lambda: SENTENCES, tokenizer, 32)
    trainer = TokComVAETrainer(model=TokComVAE(config), args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 40
    # Forty steps of four rows are more than one reading of the documents.
    assert sum(1 for _ in rows) < 40 * 4


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    class Nameless:
        eos_token_id, name_or_path = None, "nameless"

    with pytest.raises(ValueError, match="'nameless' has no EOS token"):
        pack(SENTENCES, Nameless(), 8)


# -------------------------------------------------------------------------------------------------------------- all of it
def test_streamed_and_whole_reading_give_rows_of_the_same_kind(hub_folder):
    options = {"dataset_name": hub_folder, "text_column": "content", "vocab_size": 300, "length": 32}
    for streaming in (False, True):
        rows = load_text_rows(**options, streaming=streaming, validation_share=0.2, offset_copies=2)
        text = rows.tokenizer.decode(np.concatenate([rows.train.token_ids, rows.validation.token_ids]))
        assert sorted(text.split(EOS_TOKEN)[:-1]) == sorted(SENTENCES)
        assert len(rows.train.offsets) == 2 and rows.validation.offsets == (0,)


def test_the_held_out_text_stays_out_of_the_tokenizer(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    rows = load_text_rows(str(file), vocab_size=300, length=32, validation_share=0.1, seed=3)
    train, _ = split_documents(SENTENCES, 0.1, seed=3)
    assert rows.tokenizer.get_vocab() == train_tokenizer(train, 300).get_vocab()


def test_held_out_text_of_its_own(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text.upper()}) for text in SENTENCES[:5]))
    files = str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")
    rows = load_text_rows(files[0], validation_file=files[1], vocab_size=300, length=32)
    text = [rows.tokenizer.decode(part.token_ids).split(EOS_TOKEN)[:-1] for part in (rows.train, rows.validation)]
    assert text == [SENTENCES, [sentence.upper() for sentence in SENTENCES[:5]]]
    assert rows.tokenizer.get_vocab() == train_tokenizer(SENTENCES, 300).get_vocab()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a b c", {"length": 30}, "multiple of chunk_size=4, got 30"),
        ("a b c", {"length": 0}, "multiple of chunk_size=4, got 0"),
        ("a b c", {"chunk_size": 0}, "multiple of chunk_size=0"),
        ("a", {}, "shorter than a chunk"),
    ],
)
def test_lengths_that_cannot_work_are_refused(tmp_path, text, options, message):
    file = tmp_path / "a.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_text_rows(str(file), **{"length": 32, "vocab_size": 300} | options)


def test_a_folder_of_vocabulary_and_merges_is_a_tokenizer(tmp_path):
    import json

    trained = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 5], 280)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    loaded = load_tokenizer(str(tmp_path))
    text = "the quick dog — ümlaut"
    assert loaded(text).input_ids == trained(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert len(loaded) == len(trained) and loaded.eos_token_id == trained.eos_token_id


def test_ids_without_a_token_are_filled(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(letters | {"th": 270, EOS_TOKEN: 300}, [("t", "h")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    gaps = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS_TOKEN)
    assert len(gaps) == 258
    gaps.save_pretrained(tmp_path / "gaps")
    tokenizer = load_tokenizer(str(tmp_path / "gaps"))
    assert len(tokenizer) == 301 and tokenizer.eos_token_id == 300
    text = "the thing <unused:259>"
    assert tokenizer(text).input_ids == gaps(text).input_ids and tokenizer.decode(tokenizer(text).input_ids) == text
    tokenizer.save_pretrained(tmp_path / "filled")
    assert len(load_tokenizer(str(tmp_path / "filled"))) == 301
    # One that is loaded already is copied, for the caller's own has no use of the added tokens.
    assert len(load_tokenizer(gaps)) == len(load_tokenizer(tmp_path / "gaps")) == 301 and len(gaps) == 258
    (tmp_path / "t.txt").write_text("hello world. " * 100)
    rows = load_text_rows(train_file=tmp_path / "t.txt", tokenizer=str(tmp_path / "gaps"), length=16)
    assert max(rows.train.token_ids.max(), rows.validation.token_ids.max()) < len(rows.tokenizer)
    # Sizes are compared by the highest id also where a tokenizer was not loaded here.
    check_tokenizer(gaps, type("Config", (), {"omni_token_id": 301}))
