"""Caption rows, joint collation and the small InternVL's inputs."""

import json

import pytest
import torch
from PIL import Image

from tokcom_hf.data.captions import JointLFQCollator, SceneArguments, read_image_text_jsonl, scene_caption_rows
from tokcom_hf.small_models.small_internvl import TileProcessor, build_small_internvl, scene_tile_processor

VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_scene_rows_are_seeded_and_captioned_with_words_the_tokenizer_knows():
    scenes = SceneArguments(image_size=32, num_shapes=4, num_colours=4)
    rows, again, other = (scene_caption_rows(30, seed, 3, scenes) for seed in (5, 5, 6))
    assert [r["caption"] for r in rows] == [r["caption"] for r in again] != [r["caption"] for r in other]
    assert all(1 <= len(r["questions"]) == len(r["answers"]) == len(r["types"]) <= 3 for r in rows)
    assert rows[0]["image"].size == (32, 32)
    tokenizer = scene_tile_processor(32, 4).tokenizer
    texts = [text for r in rows for text in [r["caption"], *r["questions"], *[a for (a,) in r["answers"]]]]
    assert tokenizer.unk_token_id not in tokenizer(" ".join(texts)).input_ids


def test_json_lines_with_captions(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    lines = [
        {"image": "a.png", "caption": "red", "question": "colour ?", "answer": "red", "type": "c"},
        {"image": "a.png", "caption": "all red"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = read_image_text_jsonl(path)
    assert rows[0]["image"].size == (8, 8) and rows[0]["answers"] == [["red"]] and rows[0]["types"] == ["c"]
    assert rows[1]["answers"] == [["all red"]] and rows[1]["questions"] == ["what is in the image ?"]
    path.write_text('{"image": "a.png", "caption": "x"}\n{"image": "a.png"}', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected JSON with image, caption"):
        read_image_text_jsonl(path)
    path.write_text('{"image": "a.png", "caption": "x", "question": "q"}', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected JSON"):
        read_image_text_jsonl(path)
    path.write_text('{"image": "b.png", "caption": "x"}', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="line 1: image"):
        read_image_text_jsonl(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no rows"):
        read_image_text_jsonl(path)


def test_the_joint_batch_holds_questions_and_captions():
    processor = scene_tile_processor(32, 4)
    tokenizer = processor.tokenizer
    rows = scene_caption_rows(4, 0, 2, image_size=32)
    batch = JointLFQCollator(processor)([rows[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert int((batch["input_ids"] == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum()) == 16
    # Every caption ends, after its padding on the left, with the start-of-image token.
    start = tokenizer.convert_tokens_to_ids("<img>")
    assert (batch["caption_ids"][:, -1] == start).all() and batch["caption_mask"][:, -1].all()
    for row, ids, mask in zip([rows[i] for i in range(4)], batch["caption_ids"], batch["caption_mask"]):
        assert tokenizer.decode(ids[mask.bool()][:-1]) == row["caption"]
        assert torch.equal(mask, mask.sort().values)
    # Labels are the answers and the end token of every question.
    told = batch["input_ids"][batch["labels"] != -100]
    assert torch.equal(told, batch["labels"][batch["labels"] != -100])
    assert int((told == tokenizer.eos_token_id).sum()) == sum(len(rows[i]["questions"]) for i in range(4))


def test_packed_questions_do_not_see_each_other_and_captions_are_the_same():
    model, processor = build_small_internvl(VISION, TEXT)
    rows = [scene_caption_rows(1, 3, 3, image_size=32)[0]]
    turns, packed = JointLFQCollator(processor)(rows), JointLFQCollator(processor, packed=True)(rows)
    assert torch.equal(turns["caption_ids"], packed["caption_ids"])
    told = packed["labels"] != -100
    alone = [row | {"questions": row["questions"][-1:], "answers": row["answers"][-1:]} for row in rows]
    single = JointLFQCollator(processor)(alone)
    last = int((single["labels"] != -100).sum())
    with torch.no_grad():
        logits = [model(**{k: v for k, v in b.items() if "caption" not in k}).logits for b in (packed, single)]
    before = torch.roll(told, -1, 1)
    answer = torch.roll(single["labels"] != -100, -1, 1)
    assert torch.allclose(logits[0][before][-last:], logits[1][answer], atol=1e-5)


def test_the_small_internvl_loads_like_a_real_one(tmp_path):
    model, processor = build_small_internvl(VISION, TEXT)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = TileProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (50, 40), "blue")
    inputs = again(["<IMG_CONTEXT> what is in the image ?"], [image])
    assert inputs["input_ids"].tolist() == processor(["<IMG_CONTEXT> what is in the image ?"])["input_ids"].tolist()
    assert model(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], len(again.tokenizer))
    assert again.image_seq_length == 4


def test_foreign_tokenizers_and_models_are_refused(tmp_path):
    from transformers import GPT2Config, PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=scene_tile_processor(32, 4).tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no start_image_token"):
        TileProcessor(plain, None, 4)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' model; joint LFQ training needs an InternVL"):
        TileProcessor.from_pretrained(tmp_path)
