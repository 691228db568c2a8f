"""Packed questions stand where they would stand alone; patch labels say what the picture shows."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.scene_patches import ScenePatchDataset, patch_labels
from tokcom_hf.data.scenes import COLOURS, SHAPES, Scene, SceneObject, render_scene, sample_scene
from tokcom_hf.data.vqa import VQACollator, scene_rows
from tokcom_hf.small_models.small_vlm import scene_processor


def small_llava(processor) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **sizes},
        text_config=LlamaConfig(**sizes, vocab_size=len(processor.tokenizer), initializer_range=0.3),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config).eval()


def test_every_packed_question_gets_the_logits_it_gets_alone():
    processor = scene_processor(32, 8)
    rows = scene_rows(2, 0, image_size=32, questions_per_image=4)
    rows = [rows[0], rows[1]]
    model = small_llava(processor)
    batch = PackedVQACollator(processor)(rows)
    packed = model(**batch).logits
    for number, row in enumerate(rows):
        at = 16
        for question, answers in zip(row["questions"], row["answers"]):
            alone = VQACollator(processor)([row | {"questions": [question], "answers": [answers]}])
            wanted = model(**alone).logits[0, 16:]
            end = at + len(wanted)
            assert torch.equal(batch["labels"][number, at:end], alone["labels"][0, 16:])
            torch.testing.assert_close(packed[number, at:end], wanted, atol=1e-5, rtol=1e-4)
            at = end
        assert (batch["labels"][number, at:] == -100).all()


def test_packed_questions_need_an_image_in_front():
    processor = scene_processor(32, 8)
    with pytest.raises(ValueError, match="image in front"):
        PackedVQACollator(processor, prompt="{question} <image>")
    row = scene_rows(1, 0, image_size=32)[0] | {"image": None}
    with pytest.raises(ValueError, match="VQACollator"):
        PackedVQACollator(processor)([row])


def test_patch_labels_name_the_object_of_the_cell():
    item = SceneObject("cross", "blue", "large", row=1, column=0, dot="pink")
    labels = patch_labels(Scene((item,), 2, (0, 0, 0)), side=4).view(4, 4, 6)
    expected = [1 + SHAPES.index("cross"), 1 + list(COLOURS).index("blue"), 2, 3]
    assert (labels[2:, :2, :4] == torch.tensor(expected)).all()
    assert (labels[:2, :, :4] == 0).all() and (labels[2:, 2:, :4] == 0).all()
    assert labels[3, 1, 4:].tolist() == [3, 1]
    with pytest.raises(ValueError, match="whole patches"):
        patch_labels(Scene((item,), 3, (0, 0, 0)), side=4)


def test_patch_pixels_are_what_the_image_processor_makes():
    processor = scene_processor(32, 8).image_processor
    data = ScenePatchDataset(3, 7, processor, 32, 4, grid=4, max_objects=3)
    image = render_scene(sample_scene(random.Random("patches 7 2"), grid=4, max_objects=3), 32)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(data[2]["pixel_values"], expected)
