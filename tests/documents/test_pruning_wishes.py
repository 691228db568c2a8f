"""The optional improvements that the pruning documents list, and their remedies against running out of memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tokcom_hf import LayerPruner, LayerPrunerConfig, PrunedVLM, TokenMergerConfig
from tokcom_hf.data.image_limit import ImageLimit
from tokcom_hf.data.scene_tokenizer import scene_tokenizer
from tokcom_hf.data.small_vlm import scene_processor
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, vqa_collator
from tokcom_hf.metrics.vqa import bleu

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from pruned_vlm_tools import FAMILIES, batch, tiny_vlm


# ---------------------------------------------------------------------- hierarchical schedules
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_has_its_own_ratio(family):
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 2, 3], keep_ratio=[0.75, 0.5, 0.34], internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm(family), layer_pruner=pruner).eval()
    model.generate(**batch(family), max_new_tokens=2)
    # 16 tokens: 12 before layer 1, 6 of them before layer 2, 2 of those before layer 3.
    assert model.token_report()["vision_tokens_per_layer"] == [16, 12, 6, 2]


def test_a_schedule_of_ratios_is_saved_and_one_number_is_the_same_at_every_layer(tmp_path):
    listed = LayerPruner(
        LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_ratio=[0.5, 0.5], internal_size=16)
    ).eval()
    listed.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.keep_ratio == [0.5, 0.5]
    single = LayerPruner(LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_ratio=0.5, internal_size=16)).eval()
    single.load_state_dict(listed.state_dict())
    hidden, question = torch.randn(2, 9, 32), torch.randn(2, 3, 32)
    for layer in (1, 2):
        kept = [pruner(layer, hidden, question).keep_mask for pruner in (listed, again, single)]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_schedule_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"one per layer \[10, 20, 31\]: 3, got \[0.7, 0.5\]"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5])
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got \[0.7, 0.5, 0.0\]"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5, 0.0])
    with pytest.raises(ValueError, match="are two schedules; give one of them"):
        LayerPrunerConfig(keep_ratio=[0.7, 0.5, 0.3], keep_tokens=[20, 10, 5])
    with pytest.raises(ValueError, match="one falling number per layer"):
        LayerPrunerConfig(keep_tokens=[20, 10])


def test_the_recipe_takes_a_schedule():
    import train_token_pruning as recipe

    from tokcom_hf.cli import parse_recipe

    given = ["--layers", "1", "2", "3", "--keep_tokens", "null", "--keep_ratio", "0.7", "0.5", "0.3"]
    values = parse_recipe(recipe.__doc__, recipe.SECTIONS, recipe.DEFAULT_CONFIG, given)
    config = LayerPrunerConfig(**values["pruner"] | {"hidden_size": 32})
    assert config.keep_ratio == [0.7, 0.5, 0.3] and config.keep_tokens is None


# ---------------------------------------------------------------------- questions and captions in one run
def test_smoothed_bleu_of_right_short_answers():
    """BLEU+1 by hand: one is added to matches and counts of the orders above 1."""
    assert bleu(["red"], [["red"]]) == 0.0 and bleu(["red"], [["red"]], smooth=True) == pytest.approx(100.0)
    assert bleu(["blue"], [["red"]], smooth=True) == 0.0
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours.
    expected = 100 * (5 / 6 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25
    assert bleu(["the cat sat on a mat"], [["the cat sat on the mat"]], smooth=True) == pytest.approx(expected)
    # 2 of 3 words, and no longer n-gram matches: (2/3 · 1/3 · 1/2 · 1)^(1/4).
    expected = 100 * (2 / 3 * 1 / 3 * 1 / 2) ** 0.25
    assert bleu(["a red dot"], [["a blue dot"]], smooth=True) == pytest.approx(expected)


@pytest.fixture(scope="module")
def processor():
    return scene_processor(32, 8)


def told(processor, batch):
    """The texts that a batch is trained on, row by row."""
    rows = [labels[labels != -100] for labels in batch["labels"]]
    return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


def test_each_batch_of_both_tasks_holds_questions_and_captions(processor):
    source = VQASourceArguments(task="both", train_images=6, eval_questions=5, eval_captions=3, questions_per_image=1)
    train, held_out = load_vqa_rows(source, "no folder")
    assert len(train) == 6 and [row.get("task") for row in held_out.rows] == [None] * 5 + ["caption"] * 3
    rows = [row | {"image": row["image"].resize((32, 32))} for row in (train[i] for i in range(6))]
    texts = told(processor, vqa_collator(source, processor)(rows))
    for place, (text, row) in enumerate(zip(texts, rows)):
        assert text.strip() == (row["caption"] if place % 2 else row["answers"][0][0])
    only = vqa_collator(VQASourceArguments(task="caption"), processor)
    assert [text.strip() for text in told(processor, only(rows))] == [row["caption"] for row in rows]
    plain = vqa_collator(VQASourceArguments(), processor)
    assert [text.strip() for text in told(processor, plain(rows))] == [row["answers"][0][0] for row in rows]
    # Single rows, too, come as one task or the other, the same at every call.
    alone = [told(processor, vqa_collator(source, processor)([row]))[0].strip() for row in rows for _ in range(2)]
    assert alone[::2] == alone[1::2]
    kinds = {text == row["caption"] for text, row in zip(alone[::2], rows)}
    assert kinds == {True, False}


def test_captions_come_from_json_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "caption": "a red dot"},
        {"image": "a.png", "question": "q ?", "answer": "x", "caption": "a dot"},
        {"question": "n ?", "answer": "z"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = VQASourceArguments(task="both", train_file=str(path), eval_file=str(path), caption_request="describe it")
    train, held_out = load_vqa_rows(source, "base")
    assert [row["questions"] for row in held_out.rows] == [["q ?"], ["n ?"], ["describe it"], ["describe it"]]
    assert [row["answers"][0] for row in held_out.rows] == [["x"], ["z"], ["a red dot"], ["a dot"]]
    assert [(len(row["questions"]), row.get("caption")) for row in train.rows] == [
        (0, "a red dot"), (1, "a dot"), (1, None),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="line 3: expected JSON with image and caption, but 'caption' is missing"):
        load_vqa_rows(VQASourceArguments(task="caption", eval_file=str(path)), "base", training=False)
    with pytest.raises(ValueError, match="line 1: expected JSON with image, question and answer, but 'question'"):
        load_vqa_rows(VQASourceArguments(eval_file=str(path)), "base", training=False)
    path.write_text(json.dumps(lines[2]), encoding="utf-8")
    with pytest.raises(ValueError, match="needs a caption in at least one row, and none of 1 has one; set task: vqa"):
        load_vqa_rows(VQASourceArguments(task="both", eval_file=str(path)), "base", training=False)


def test_tasks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="task must be one of vqa, caption, both, got 'captions'"):
        VQASourceArguments(task="captions")
    with pytest.raises(ValueError, match="columns known of Hub data sets have none"):
        VQASourceArguments(task="both", dataset_name="lmms-lab/VQAv2")


# ---------------------------------------------------------------------- against running out of memory
class AnyResolution:
    """Qwen2-VL's image processor and a tokenizer; the processor that joins them needs torchvision for its videos."""

    image_token = "<image>"

    def __init__(self):
        pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
        self.tokenizer = scene_tokenizer({"image_token": "<image>"})

    def __call__(self, text, images, **options):
        grids = self.image_processor(images)["image_grid_thw"]
        counts = [int(grid.prod()) // 4 for grid in grids]
        return self.tokenizer([words.replace("<image>", "<image>" * n) for words, n in zip(text, counts)])


def tiles():
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    tokenizer = scene_tokenizer({"image_token": "<image>"})
    return LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def test_image_max_size_shrinks_the_longest_side(processor):
    limit = ImageLimit(processor, image_max_size=800)
    assert [limit(Image.new("RGB", size)).size for size in ((1600, 1200), (600, 2400), (800, 10), (64, 64))] == [
        (800, 600), (200, 800), (800, 10), (64, 64),
    ]  # fmt: skip
    seen = []
    spy = lambda image: seen.append(image.size) or image  # noqa: E731
    collator = vqa_collator(VQASourceArguments(image_max_size=20), processor)
    collator.image_limit = lambda image, limit=collator.image_limit: spy(limit(image))
    row = {"image": Image.new("RGB", (40, 30)), "questions": ["what ?"], "answers": [["red"]], "types": ["all"]}
    collator([row])
    assert seen == [(20, 15)]


def test_max_vision_tokens_bounds_images_of_any_resolution():
    processor = AnyResolution()
    limit = ImageLimit(processor, max_vision_tokens=40)
    for size in ((600, 400), (60, 300), (900, 900), (30, 30)):
        before, small = limit.vision_tokens(size), limit(Image.new("RGB", size))
        after = limit.vision_tokens(small.size)
        assert after <= 40 and after >= min(before, 30)
        assert (small.size == size) == (before <= 40)
        assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.05)
    # The two limits together: first the pixels, then the tokens.
    both = ImageLimit(processor, image_max_size=100, max_vision_tokens=40)(Image.new("RGB", (900, 900)))
    assert both.size == (100, 100)


def test_max_vision_tokens_of_tiles_and_of_fixed_resolutions(processor):
    wide = Image.new("RGB", (600, 400))
    assert ImageLimit(tiles()).vision_tokens(wide.size) == 70
    smaller = ImageLimit(tiles(), max_vision_tokens=60)(wide)
    assert ImageLimit(tiles()).vision_tokens(smaller.size) <= 60 and smaller.size < wide.size
    with pytest.raises(
        ValueError, match=r"makes at least 52 vision tokens .* set --target_merge_tokens .* to 40 or less"
    ):
        ImageLimit(tiles(), max_vision_tokens=40)(wide)
    # 16 tokens whatever the picture: within the limit, or not; a merger that leaves few enough makes up for it.
    assert ImageLimit(processor, max_vision_tokens=1200)(wide) is wide
    with pytest.raises(ValueError, match="makes at least 16 vision tokens"):
        ImageLimit(processor, max_vision_tokens=8)(wide)
    merger = TokenMergerConfig(feature_size=16, question_size=32, target_merge_tokens=8, internal_size=16)
    kept = PrunedVLM.from_base(tiny_vlm("llava"), merger).config.tokens_kept
    assert ImageLimit(processor, max_vision_tokens=8, kept=kept)(wide) is wide
    with pytest.raises(ValueError, match="makes at least 16 vision tokens"):
        ImageLimit(processor, max_vision_tokens=7, kept=kept)(wide)
    # InternVL's tiles are merged one by one: 3 tiles of 16 tokens leave 3 times 8.
    merger = TokenMergerConfig(feature_size=64, question_size=32, target_merge_tokens=8, internal_size=16)
    assert PrunedVLM.from_base(tiny_vlm("internvl"), merger).config.tokens_kept(48) == 24
    assert PrunedVLM.from_base(tiny_vlm("llava"), strategy="uniform", keep=5).config.tokens_kept(16) == 5
    for name in ("image_max_size", "max_vision_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            VQASourceArguments(**{name: 0})


def test_the_documented_yaml_sets_both_limits(tmp_path):
    import train_token_pruning as recipe

    from tokcom_hf.cli import parse_recipe
    from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING

    config = tmp_path / "vision_token_pruning.yaml"
    config.write_text("method_settings:\n  max_vision_tokens: 1200\n  image_max_size: 800\n", encoding="utf-8")
    given = ["--config", str(config)]
    values = parse_recipe(recipe.__doc__, recipe.SECTIONS, None, given, aliases=TRAIN_TOKEN_PRUNING)
    assert values["data"] == {"max_vision_tokens": 1200, "image_max_size": 800}
