"""VQA rows from every source, and the collator's labels."""

import json

import pytest
from PIL import Image

from tokcom_hf.data.vqa import VQACollator, map_vqa_columns, read_vqa_jsonl, scene_rows
from tokcom_hf.small_models.small_vlm import scene_processor


def test_json_lines_with_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "q ?", "answer": ["x", "y"], "type": "t"},
        {"question": "n ?", "answer": "z"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = read_vqa_jsonl(path)
    assert rows[0]["image"].size == (8, 8) and rows[0]["answers"] == [["x", "y"]] and rows[1]["image"] is None
    path.write_text('{"image": "b.png", "question": "q", "answer": "a"}', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="line 1: image"):
        read_vqa_jsonl(path)
    path.write_text('{"question": "q"}', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected JSON with image, question and answer"):
        read_vqa_jsonl(path)


def test_known_hub_columns():
    record = {
        "image": None,
        "question": "q",
        "answers": [{"answer": "no"}] * 3 + [{"answer": "yes"}] * 7,
        "answer_type": "b",
    }
    row = map_vqa_columns([record], "lmms-lab/VQAv2")[0]
    assert row["answers"][0][0] == "yes" and len(row["answers"][0]) == 10 and row["types"] == ["b"]
    science = {"image": None, "question": "q", "choices": ["u", "v"], "answer": 1, "subject": "s"}
    row = map_vqa_columns([science], "derek-thomas/ScienceQA")[0]
    assert row["answers"] == [["v"]] and row["questions"] == ["q Choices: u, v."]
    assert map_vqa_columns([{"question": "q", "answer": "no", "category": "c"}], "lmms-lab/POPE")[0]["types"] == ["c"]
    with pytest.raises(ValueError, match="No column mapping"):
        map_vqa_columns([], "someone/data")
    with pytest.raises(ValueError, match="lacks columns"):
        map_vqa_columns([{"text": "q"}], "gqa")


def test_labels_cover_answers_only_and_generation_pads_left():
    processor = scene_processor(32, 8)
    rows = scene_rows(3, 0, image_size=32, questions_per_image=3)
    batch = VQACollator(processor)([rows[i] for i in range(3)])
    told = batch["labels"][0][batch["labels"][0] != -100]
    words = processor.tokenizer.decode(told, skip_special_tokens=True).split()
    assert words == [answers[0] for answers in rows[0]["answers"]]
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 3 * 16
    asked = VQACollator(processor, answers=False)([rows[i] for i in range(3)])
    assert "labels" not in asked and asked["attention_mask"][:, -1].all()
    text_only = VQACollator(processor)([rows[0] | {"image": None}])
    assert "pixel_values" not in text_only
