"""Markers become ids and ids markers; the pipeline draws."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from tokcom_hf import VQGAN, LFQExpandedModel, LFQProcessor, VQGANConfig, VQGANImageProcessor
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.small_models.small_vlm import scene_processor

BITS, START = 4, 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle and a blue ring at the top left"] * 4, 280)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return LFQProcessor(tokenizer, START, BITS, image_prompt="draw {caption} :")


def test_markers_become_ids_and_back(processor, tokenizer):
    text = "a red circle<lfq:3><lfq:15> and a blue ring<lfq:0>"
    ids = processor(text=text)["input_ids"][0]
    assert [i for i in ids if i >= START] == [START + 3, START + 15, START]
    assert processor.decode(ids) == text
    assert processor.decode(ids, skip_lfq_tokens=True) == "a red circle and a blue ring"
    assert ids[: ids.index(START + 3)] == tokenizer("a red circle").input_ids
    assert processor(text="<lfq:7>")["input_ids"] == [[START + 7]]
    assert [run.tolist() for run in processor.split_images(ids)] == [[START + 3, START + 15], [START]]
    assert [run.tolist() for run in processor.split_images(ids, 1)] == [[START + 3], [START + 15], [START]]
    assert processor.codes(torch.tensor([START + 5])).tolist() == [[1, 0, 1, 0]]
    codes = torch.tensor([[1, 2], [3, 4]])
    assert processor(text=processor.render(codes))["input_ids"] == [[START + c for c in (1, 2, 3, 4)]]
    # Text that only looks like a marker stays text.
    assert processor.decode(processor(text="<lfq:x>")["input_ids"][0]) == "<lfq:x>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_tensors(processor, tokenizer, side):
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.eos_token
    batch = processor(text=["a ring<lfq:1>", "<lfq:2>"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    row = batch["input_ids"][1][batch["attention_mask"][1].bool()]
    assert row.tolist() == [START + 2] and batch["attention_mask"][1, 0 if side == "right" else -1] == 1
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=["a ring<lfq:1>", "<lfq:2>"], return_tensors="pt")


def test_special_tokens_go_around_the_whole_text():
    tokenizer = scene_processor(16, 8).tokenizer
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    processor = LFQProcessor(tokenizer, 100, BITS)
    assert processor(text="red <lfq:1> blue")["input_ids"][0][-1] == end
    assert processor(text="red <lfq:1> blue")["input_ids"][0].count(end) == 1
    assert end not in processor(text="red <lfq:1> blue", add_special_tokens=False)["input_ids"][0]


def test_a_base_processor_with_images(tmp_path):
    base = scene_processor(16, 8)
    processor = LFQProcessor(base.tokenizer, 100, BITS, base=base)
    text = ["<image> what shape is the red object ? <lfq:5>", "<lfq:6> <image> how many"]
    batch = processor(text=text, images=[Image.new("RGB", (16, 16))] * 2, padding=True, return_tensors="pt")
    image_id = base.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [4, 4] and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert (batch["input_ids"] == 105).sum() == 1 and (batch["input_ids"] == 106).sum() == 1
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.base) is type(base)
    more = again(text=text, images=[Image.new("RGB", (16, 16))] * 2, padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], more[name]) for name in batch)


def test_wrong_input(processor, tokenizer):
    with pytest.raises(ValueError, match=r"<lfq:16> does not exist: codes are 0 … 15"):
        processor(text="<lfq:16>")
    with pytest.raises(ValueError, match="sees no images"):
        processor(text="a", images=Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match="needs text"):
        processor()
    with pytest.raises(ValueError, match="they would mean two things"):
        LFQProcessor(tokenizer, len(tokenizer) - 1, BITS)
    with pytest.raises(ValueError, match=r"must contain \{caption\}"):
        LFQProcessor(tokenizer, START, BITS, image_prompt="draw")


def llama_tokenizer(**more):
    """Of Llama's kind: a space before every text, ▁ in the pieces."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdeginorst", "re", "red", "▁red", "in", "ing", "ring", "▁ring"]
    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("i", "n"), ("in", "g"), ("r", "ing"), ("▁", "ring")]
    return LlamaTokenizer(vocab={piece: i for i, piece in enumerate(letters)}, merges=merges, **more)


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"add_prefix_space": False}])
def test_spaces_beside_image_tokens_are_kept_by_tokenizers_that_put_a_space_first(options):
    tokenizer = llama_tokenizer(**options)
    processor = LFQProcessor(tokenizer, len(tokenizer), 3)
    for text in (
        "red ring<lfq:3> red ring",
        "<lfq:1><lfq:2> red",
        "<lfq:1>red",
        "red<lfq:3>ring",
        "red <lfq:3> ring",
        "red<lfq:1> <lfq:2>  ring<lfq:7>red",
    ):
        for add in (False, True):
            ids = processor(text, add_special_tokens=add)["input_ids"][0]
            assert processor.decode(ids, skip_special_tokens=True) == text
    ids = [processor(text, add_special_tokens=False)["input_ids"][0] for text in ("red<lfq:3>ring", "red<lfq:3> ring")]
    assert ids[0] != ids[1]
    # Text before the first marker is encoded as ever.
    assert ids[0][: ids[0].index(len(tokenizer) + 3)] == tokenizer("red", add_special_tokens=False).input_ids


def test_rows_are_cut_and_padded_whole(tokenizer):
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    processor = LFQProcessor(tokenizer, START, BITS)
    texts = ["a red circle<lfq:1><lfq:2> and a blue ring", "<lfq:3>"]
    full = processor(text=texts)["input_ids"]
    cut = processor(text=texts, truncation=True, max_length=7)
    assert cut["input_ids"] == [full[0][:7], full[1]] and cut["attention_mask"] == [[1] * 7, [1]]
    fixed = processor(text=texts, padding="max_length", truncation="longest_first", max_length=7, return_tensors="pt")
    assert fixed["input_ids"].shape == (2, 7) and fixed["attention_mask"].sum(1).tolist() == [7, 1]
    left = processor(text=texts, padding=True, padding_side="left", pad_to_multiple_of=8, return_tensors="pt")
    assert left["input_ids"].shape[1] % 8 == 0 and left["input_ids"][1, -1] == START + 3
    assert "attention_mask" not in processor(text=texts, return_attention_mask=False)
    for wrong, message in (
        ({"padding": "longst"}, "padding must be"),
        ({"truncation": "only_second"}, "truncation must be"),
        ({"truncation": True}, "need max_length"),
        ({"max_length": 4}, "max_length acts with"),
        ({"padding_side": "middle"}, "padding_side must be"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=texts, **wrong)
    for name in ("paddding", "text_pair", "return_overflowing_tokens", "stride"):
        with pytest.raises(TypeError, match=name):
            processor(text=texts, **{name: True})


def test_special_tokens_stay_and_images_are_never_cut():
    base = scene_processor(16, 8)
    processor = LFQProcessor(base.tokenizer, 100, BITS, base=base)
    picture, text = Image.new("RGB", (16, 16)), "<image> what shape is the red object ? <lfq:5>"
    cut = processor(text=text, images=picture, truncation=True, max_length=6)["input_ids"][0]
    assert len(cut) == 6 and cut.count(base.tokenizer.convert_tokens_to_ids("<image>")) == 4
    with pytest.raises(ValueError, match="would cut the tokens of an image"):
        processor(text=text, images=picture, truncation=True, max_length=3)
    with pytest.raises(TypeError, match="imagse"):
        processor(text=text, imagse=picture)


def test_a_tokenizer_with_ids_left_out_is_measured_by_its_highest_id(tokenizer):
    from tokenizers import Tokenizer, models

    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a")))
    with pytest.raises(ValueError, match="ids up to 9"):
        LFQProcessor(gaps, 5, BITS)
    processor = LFQProcessor(gaps, 10, BITS)
    assert processor.decode([9, 10]) == "b<lfq:0>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lfq_pipeline")
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=START, **text, bos_token_id=None, eos_token_id=None))
    tokenizer.pad_token = tokenizer.eos_token
    model = LFQExpandedModel.from_base(base, output_dim=BITS, tokenizer=tokenizer)
    model.save_pretrained(folder)
    LFQProcessor.from_model(model, tokenizer, image_prompt="draw {caption} :").save_pretrained(folder)
    config = VQGANConfig(
        image_size=16, quantizer="lfq", codebook_size=2**BITS, codebook_dim=4, patch_size=4, base_channels=8,
        channel_multipliers=[1, 1], num_res_blocks=1, mid_attention=False,
    )  # fmt: skip
    VQGAN(config).save_pretrained(folder / "image_decoder")
    VQGANImageProcessor(16, 3, size_divisor=8).save_pretrained(folder / "image_decoder")
    return folder


def test_the_pipeline_draws(folder):
    pipe = pipeline("lfq-image-text", model=str(folder))
    one = pipe("a red circle", seed=1)
    assert one[0]["images"][0].size == (16, 16) and len(one[0]["token_ids"]) == 4 and one[0]["generated_text"] == ""
    assert all(START <= token < START + 16 for token in one[0]["token_ids"])
    assert pipe("a red circle", seed=1)[0]["token_ids"] == one[0]["token_ids"]
    many = pipe(["a red circle", "a blue ring at the top"], guidance_scale=2.0, num_return_sequences=2, seed=2)
    assert [len(row) for row in many] == [2, 2] and many[1][1]["images"][0].size == (16, 16)
    text = pipe("a red", mode="text", max_new_tokens=5)
    assert text[0]["images"] == [] and max(text[0]["token_ids"]) < START
    with pytest.raises(TypeError, match="texts, or dictionaries"):
        pipe([1, 2])
    with pytest.raises(ValueError, match="needs the LFQProcessor"):
        pipeline("lfq-image-text", model=pipe.model, processor=scene_processor(16, 8))


def test_wrong_texts_and_misspelt_settings_are_named(processor):
    for text in (5, ["a ring", None], [["a ring"]]):
        with pytest.raises(TypeError, match="a string or a list of strings"):
            processor(text=text)
    with pytest.raises(TypeError, match="image_promt"):
        LFQProcessor(processor.tokenizer, processor.lfq_start_token_id, 3, image_promt="{caption}")


@pytest.mark.slow
def test_the_pipeline_runs_where_the_package_is_not_installed(folder, tmp_path):
    code = f"""
import sys
sys.modules["tokcom_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
batch = processor(text="a ring<lfq:3>", return_tensors="pt")
ids = model.generate(**batch, mode="image", num_image_tokens=4, do_sample=False)
print(processor.decode(ids[0]))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = LFQExpandedModel.from_pretrained(folder), LFQProcessor.from_pretrained(folder)
    batch = processor(text="a ring<lfq:3>", return_tensors="pt")
    ids = model.generate(**batch, mode="image", num_image_tokens=4, do_sample=False)
    assert done.stdout.strip().splitlines()[-1] == processor.decode(ids[0])
