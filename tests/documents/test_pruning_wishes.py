"""The optional improvements that the pruning documents list, and their remedies against running out of memory."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPVisionConfig, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers.pruned_vlm_tools import FAMILIES, batch, mixed_sizes, tiny_vlm
from tests.helpers.small_families import OTHER_FAMILIES
from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    PrunedVLM,
    TokenMerger,
    TokenMergerConfig,
    TokenPruningTrainer,
    TokenPruningTrainingArguments,
)
from tokcom_hf.data.image_limit import ImageLimit
from tokcom_hf.data.vqa import VQACollator, VQADataset
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows, vqa_collator
from tokcom_hf.data.vqa_tasks import caption_row
from tokcom_hf.evaluation.pruning_answers import evaluate_mode
from tokcom_hf.metrics.vqa import bleu
from tokcom_hf.models.pruning_question_ratio import confident_count, within
from tokcom_hf.small_models.scene_tokenizer import scene_tokenizer
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor
from tokcom_hf.trainers.pruning_attention_guidance import attention_reader, guidance_loss, read_share, reading_scores

PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [5, 2], "internal_size": 16}


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


# ---------------------------------------------------------------------- merging guided by the question's attention
def prompt_of(family):
    """A VLM of a family and a prompt with two images, of different sizes where the family has them."""
    if family in FAMILIES:
        base = tiny_vlm(family)
        if family != "qwen2_5_vl":
            return base, batch(family, images=(1, 2))
        inputs = mixed_sizes()
        return base, inputs | {"mm_token_type_ids": (inputs["input_ids"] == 99).int()}
    return OTHER_FAMILIES[family]()


def guided(base, **options):
    probe = PrunedVLM.from_base(base)
    config = TokenMergerConfig(
        feature_size=probe.family.feature_size, question_size=32, target_merge_tokens=3, internal_size=16,
        attention_guided="question", **options,
    )  # fmt: skip
    torch.manual_seed(1)
    model = PrunedVLM.from_base(base, config).eval()
    with torch.no_grad():
        for layer in (model.token_merger.question_guide.query, model.token_merger.question_guide.key):
            layer.weight.normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_questions_attention_guides_the_merger_of_every_family(family):
    base, inputs = prompt_of(family)
    model = guided(base, gumbel_noise=False)
    merger, calls = model.token_merger, []
    merger.register_forward_hook(
        lambda module, args, output: calls.append((args[0], args[1], args[2], output.scores, output.keep_index))
    )
    with torch.no_grad():
        model(**inputs)
        every, images = list(calls), sum(len(call[0]) for call in calls)
        assert images == len(model.image_tokens) and images > 1
        assert {call[3].shape[1] for call in every} == set(model.image_tokens)
        # By hand: words attend to tokens, the mean over heads and real words, its logarithm added to the scores.
        for features, words, mask, scores, kept in every:
            tokens = merger.feature_proj(merger.feature_norm(features.to(merger.weight_dtype)))
            question = merger.question_norm(merger.question_proj(words))
            heads = lambda x: x.unflatten(-1, (4, 4)).transpose(1, 2)  # noqa: E731
            queries, keys = heads(merger.question_guide.query(question)), heads(merger.question_guide.key(tokens))
            attention = (queries @ keys.transpose(2, 3) / 2).softmax(-1).mean(1)
            share = torch.stack([row[real].mean(0) for row, real in zip(attention, mask)])
            assert torch.allclose(share.sum(-1), torch.ones(len(share)), atol=1e-5)
            tokens = tokens + merger.question_attention(tokens, question, mask)
            wanted = merger.scorer(tokens).squeeze(-1) + share.add(1e-6).log()
            assert torch.allclose(scores, wanted, atol=1e-4)
            assert torch.equal(kept, wanted.topk(min(3, wanted.shape[1])).indices.sort(-1).values)
    # The guide learns from what the merged tokens are used for.
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model.train()(**inputs, labels=labels, pruning_mode="soft").loss.backward()
    assert merger.question_guide.key.weight.grad.abs().sum() > 0 and merger.attention_weight.grad.abs() > 0


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
@torch.no_grad()
def test_the_guidance_of_every_family_is_its_own_attention_from_text_to_image(family):
    """The target of `guidance_weight`, against the attention that the eager model of transformers returns."""
    base, inputs = prompt_of(family)
    model = guided(base)
    reader, read = attention_reader(model)
    reader(**inputs, pruning_mode="origin")
    base.set_attn_implementation("eager")
    wanted = base(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    assert len(read) == len(wanted) == 4
    for ours, theirs in zip(read, wanted):
        for row, keep in enumerate(real):
            assert torch.allclose(ours[row][:, keep][:, :, keep], theirs[row][:, keep][:, :, keep], atol=1e-5)
    with reading_scores(model) as said:
        output = model(**inputs, pruning_mode="soft")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    loss = guidance_loss(model, read, said, output.kept_index, ids, mask)
    share = read_share(read, real & (ids != model.family.image_token_id))[ids == model.family.image_token_id]
    by_image = dict(enumerate(share.split(model.image_tokens)))
    total = 0.0
    for scores in said["merger"]:
        places = [i for i, part in by_image.items() if len(part) == scores.shape[1]]
        for place, row in zip(places, scores):
            target = by_image[place] / by_image[place].sum()
            total = total - (target * row.log_softmax(-1)).sum()
    assert loss.item() == pytest.approx(float(total) / len(by_image), rel=1e-4)


@torch.no_grad()
def test_a_guided_batch_is_what_its_rows_are_alone():
    for family in FAMILIES:
        model = guided(tiny_vlm(family), question_dependent_ratio="confidence", max_ratio=0.75)
        inputs = batch(family, images=(1, 1))
        together = model(**inputs).logits[:, -1]
        for row in range(2):
            alone = {}
            for name, value in inputs.items():
                per_row = len(value) // 2
                alone[name] = value[row * per_row : (row + 1) * per_row]
            assert torch.allclose(model(**alone).logits[0, -1], together[row], atol=1e-4)


def test_a_tower_that_does_not_tell_its_attention_is_refused():
    merger = TokenMergerConfig(feature_size=64, question_size=32, internal_size=16, attention_guided=True)
    with pytest.raises(ValueError, match="'internvl' does not give; set attention_guided to 'question'"):
        PrunedVLM.from_base(tiny_vlm("internvl"), merger)
    with pytest.raises(ValueError, match="must be false, tower or question, got 'words'"):
        TokenMergerConfig(attention_guided="words")


# ---------------------------------------------------------------------- a ratio that depends on the question
def test_confident_scores_need_few_tokens_and_their_number_follows_the_mass():
    sharp = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, -9.0, -9.0]])
    mass = torch.tensor(0.9, requires_grad=True)
    count = confident_count(sharp, mass)
    assert count.tolist() == [1, 4, 2]
    count.mean().backward()
    assert mass.grad > 0
    assert confident_count(sharp, torch.tensor(0.4)).tolist() == [1, 2, 1]
    numbers = torch.tensor([1.0, 5.0, 9.0], requires_grad=True)
    bounded = within(numbers, 2, 6)
    assert bounded.tolist() == [2, 5, 6]
    bounded.sum().backward()
    assert numbers.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["learned", "confidence"])
def test_rows_keep_numbers_of_their_own_within_bounds_and_lose_the_rest(kind):
    merger = TokenMergerConfig(
        feature_size=16, question_size=32, merger_type="question_aware", merge_ratio=0.4, min_ratio=0.125, max_ratio=0.75,
        question_dependent_ratio=kind, internal_size=16, gumbel_noise=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PrunedVLM.from_base(tiny_vlm("llava"), merger, LayerPrunerConfig(**PRUNER)).eval()
    with torch.no_grad():
        for layer in model.token_merger.scorer[::2]:
            layer.weight.normal_(0, 3)
        if kind == "learned":
            model.token_merger.ratio_head.weight.normal_(0, 4)
    inputs = batch("llava", images=(1,) * 6)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    report = model.token_report()
    entering = [row[0] for row in report["vision_tokens_by_row"]]
    assert len(set(entering)) > 2 and min(entering) >= 2 and max(entering) <= 12
    # Pruners then keep at most 5 and 2 of what a row has.
    assert [row[1:] for row in report["vision_tokens_by_row"]] == [[min(5, n), 2, 2] for n in entering]
    assert report["vision_tokens_per_layer"][0] == pytest.approx(sum(entering) / 6)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
    text = inputs["attention_mask"].sum(-1) - 16
    assert cache.segments[0].mask.sum(-1).tolist() == [n + int(t) for n, t in zip(entering, text)]
    assert cache.layers[0].keys.shape[2] == max(n + int(t) for n, t in zip(entering, text))


@pytest.mark.parametrize("kind", ["learned", "confidence"])
def test_the_expected_number_is_trained_to_the_budget_and_rows_still_differ(kind):
    torch.manual_seed(0)
    config = TokenMergerConfig(
        feature_size=16, question_size=32, merge_ratio=0.25, min_ratio=0.05, max_ratio=1.0, question_dependent_ratio=kind,
        internal_size=16, gumbel_noise=False,
    )  # fmt: skip
    merger = TokenMerger(config).train()
    features, question = torch.randn(16, 40, 16), torch.randn(16, 5, 32)
    with torch.no_grad():
        for layer in merger.scorer[::2]:
            layer.weight.normal_(0, 1)
        if kind == "learned":
            merger.ratio_head.weight.normal_(0, 2)
    parts = merger.ratio_head.parameters() if kind == "learned" else [merger.confidence]
    optimizer = torch.optim.Adam(parts, lr=0.02 if kind == "learned" else 0.002)
    first = merger(features, question)
    assert first.kept_tokens.mean() > 13
    assert first.sparsity_loss.item() == pytest.approx((first.kept_tokens.mean().item() - 10) ** 2, rel=1e-4)
    for _ in range(150):
        optimizer.zero_grad()
        merger(features, question).sparsity_loss.backward()
        optimizer.step()
    output = merger.eval()(features, question)
    counts = output.keep_mask.sum(-1)
    assert counts.float().mean().item() == pytest.approx(10, abs=1) and len(set(counts.tolist())) > 3
    assert torch.equal(counts, output.kept_tokens.round().long().clamp(min=1))


@torch.no_grad()
def test_the_budget_holds_the_mean_over_images_of_several_sizes():
    merger = TokenMergerConfig(
        feature_size=32, question_size=32, merge_ratio=0.4, max_ratio=1.0, question_dependent_ratio="learned",
        internal_size=16,
    )  # fmt: skip
    model = PrunedVLM.from_base(tiny_vlm("qwen2_5_vl"), merger).eval()
    output = model(**mixed_sizes(), pruning_mode="soft")
    # Images of 4 and 15 tokens may keep 2 and 6: four in the mean.
    assert output.merge_sparsity_loss.item() == pytest.approx((output.merge_kept_tokens.item() - 4) ** 2, rel=1e-5)
    # An untrained head asks for the middle between min_ratio and max_ratio, 0.55.
    assert output.merge_kept_tokens.item() == pytest.approx(0.55 * 19 / 2, abs=0.5)


def test_a_dynamic_ratio_that_cannot_act_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'confidence' needs max_ratio"):
        TokenMergerConfig(question_dependent_ratio="confidence")
    with pytest.raises(ValueError, match=r"max_ratio=0\.7 bounds a share that depends on the question"):
        TokenMergerConfig(max_ratio=0.7)
    with pytest.raises(ValueError, match="min_ratio <= merge_ratio <= max_ratio"):
        TokenMergerConfig(question_dependent_ratio=True, max_ratio=0.3)
    with pytest.raises(ValueError, match="got fixed_pooling"):
        TokenMergerConfig(question_dependent_ratio=True, merger_type="fixed_pooling")
    dynamic = TokenMergerConfig(
        feature_size=16, question_size=32, question_dependent_ratio="confidence", max_ratio=0.7, internal_size=16
    )
    args = TokenPruningTrainingArguments(
        output_dir=str(tmp_path), merge_sparsity_weight=0.0, adversarial_weight=0.0, use_cpu=True
    )
    with pytest.raises(ValueError, match="merge_sparsity_weight 0 would leave it untrained"):
        TokenPruningTrainer(PrunedVLM.from_base(tiny_vlm("llava"), dynamic), args)
    # Folders of before hold true or false, and no upper bound: merge_ratio is the bound then.
    before = TokenMerger(
        TokenMergerConfig(feature_size=16, question_size=32, question_dependent_ratio=True, internal_size=16)
    )
    before.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.question_dependent_ratio is True
    assert before.config.tokens_kept(20) == 10


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


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of the training recipe with every wish, on questions and captions, and its evaluation."""
    import eval_token_pruning
    import train_token_pruning

    folder = tmp_path_factory.mktemp("wishes")
    processor = scene_processor(32, 8)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    build_small_llava(vision, text | {"num_key_value_heads": 2}, processor).save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    (folder / "vlm" / "results.json").write_text(json.dumps({"scenes": {"image_size": 32, "grid": 3}}))
    config = folder / "vision_token_pruning.yaml"
    config.write_text(WISHES, encoding="utf-8")
    run = ["--config", config, "--base_model", folder / "vlm", "--output_dir", folder / "run"]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        for main, given in (
            (train_token_pruning.main, [*run, "--eval_questions", 6, "--eval_captions", 3, "--threads", 1]),
            (
                eval_token_pruning.main,
                ["--model", folder / "run", "--output_dir", folder / "eval", "--task", "both", "--eval_questions", 6,
                 "--eval_captions", 3, "--caption_max_new_tokens", 6, "--pictures", 1, "--repeats", 1],
            ),
        ):  # fmt: skip
            patch.setattr(sys, "argv", ["recipe", *map(str, given)])
            patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
            main()
            patch.undo()
    return folder, printed


WISHES = """
data: {task: both, train_images: 24, questions_per_image: 1}
method_settings:
  merger_type: question_aware
  merge_ratio: 0.5
  dynamic_merge_ratio: confidence
  attention_guided_merge: question
  pruning_layers: [1, 2]
  hierarchical_pruning: [0.75, 0.34]
  pruner_d_internal: 16
  merge_sparsity_weight: 0.01
  adv_loss_weight: 0.0
  max_vision_tokens: 16
  image_max_size: 32
merger: {max_ratio: 0.75, internal_size: 16}
training: {max_steps: 2, per_device_train_batch_size: 4, lora_r: 2, guidance_weight: 1.0, logging_steps: 1}
"""


def test_all_wishes_train_together_and_are_loaded_as_trained(both):
    folder, _ = both
    model = PrunedVLM.from_pretrained(folder / "run")
    merger, pruner = model.token_merger.config, model.layer_pruner.config
    assert (merger.question_dependent_ratio, merger.attention_guided) == ("confidence", "question")
    assert (merger.merge_ratio, merger.max_ratio) == (0.5, 0.75)
    assert pruner.keep_ratio == [0.75, 0.34] and pruner.keep_tokens is None
    results = json.loads((folder / "run" / "results.json").read_text())
    assert set(results["modes"]["hard"]["accuracy"]) <= {"count", "colour", "shape", "relation", "detail", "all"}
    assert 0 < results["modes"]["hard"]["vision_tokens_per_layer"][0] <= 12 + 1e-4


def test_evaluation_reports_accuracy_of_questions_and_bleu_of_captions_by_mode(both):
    folder, printed = both
    results = json.loads((folder / "eval" / "results.json").read_text())
    modes = ("soft", "hard", "merge_only")
    wanted = {"accuracy_baseline", "bleu_baseline", "keep_ratio_merge", "avg_original_tokens", "avg_merged_tokens"}
    wanted |= {f"{name}_{mode}" for name in ("accuracy", "bleu", "bleu_drop") for mode in modes}
    assert wanted == set(results) - {"modes", "times"}
    assert set(results["modes"]) == {"origin", *modes}
    for mode in modes:
        assert results[f"bleu_drop_{mode}"] == pytest.approx(results["bleu_baseline"] - results[f"bleu_{mode}"])
    assert results["avg_original_tokens"] == 16
    merged = results["modes"]["hard"]["merged_tokens_by_type"]
    assert "caption" in merged and "caption" not in results["modes"]["hard"]["accuracy"]
    assert results["avg_merged_tokens"] == pytest.approx(merged["all"]) and 1 <= merged["all"] <= 12
    assert results["keep_ratio_merge"] == pytest.approx(merged["all"] / 16)
    for name in wanted:
        assert any(line.startswith(f"{name}: ") for line in printed), name


def test_the_benchmark_measures_wishes_at_equal_flops(both, monkeypatch, tmp_path):
    """On a tiny random VLM; the figures of the small one are in docs/results/pruning_wishes.json."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "benchmarks"))
    import pruning_wishes

    rows = ["fixed ratio", "hierarchical list", "attention-guided", "questions and captions"]
    given = [
        "--base_model", both[0] / "vlm", "--output_dir", tmp_path, "--steps", 1, "--train_images", 12, "--eval_questions", 5,
        "--eval_captions", 2, "--threads", 1, "--per_device_train_batch_size", 4, "--rows", *rows,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pruning_wishes.py", *map(str, given)])
    pruning_wishes.main()
    small = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((Path(__file__).parents[2] / "docs" / "results" / "pruning_wishes.json").read_text())
    assert list(small["rows"]) == ["unpruned", *rows] and list(saved["rows"]) == ["unpruned", *pruning_wishes.WISHES]
    assert small["setting"] == {"steps": 1, "seed": 42, "questions": 5, "captions": 2}
    assert small["rows"]["fixed ratio"]["vision_tokens_per_layer"] == pytest.approx([12, 6, 3])
    assert small["rows"]["hierarchical list"]["vision_tokens_per_layer"] == pytest.approx([12, 7, 2])
    for name, row in saved["rows"].items():
        if name != "unpruned":
            assert row["flops_ratio"] == pytest.approx(saved["rows"]["fixed ratio"]["flops_ratio"], abs=0.03), name


def test_bleu_is_about_captions_and_accuracy_about_questions(processor):
    """A model that always says `red`: right where red is the answer, and one word of each caption at most."""

    class Red(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def generate(self, input_ids, max_new_tokens, **inputs):
            lengths.append(max_new_tokens)
            said = processor.tokenizer.convert_tokens_to_ids("red")
            return torch.cat([input_ids, torch.full_like(input_ids[:, :1], said)], 1)

        def token_report(self):
            names = (
                "flops",
                "flops_origin",
                "flops_ratio",
                "sequence_kept",
                "average_kept",
                "vision_tokens",
                "text_tokens",
            )
            report = dict.fromkeys((*names, "kv_bytes", "kv_bytes_origin"), 1.0)
            return report | {"vision_tokens_per_layer": [16.0], "vision_tokens_by_row": [[16]] * counts.pop(0)}

    image = Image.new("RGB", (32, 32))
    question = {"image": image, "questions": ["what colour is the dot ?"], "types": ["detail"]}
    rows = VQADataset(
        [question | {"answers": [["red"]]}, question | {"answers": [["blue"]]}]
        + [caption_row({"image": image, "caption": text}) for text in ("red", "a red dot")]
    )
    lengths, counts = [], [2, 2]
    result = evaluate_mode(Red(), VQACollator(processor, answers=False), rows, caption_max_new_tokens=9)
    assert lengths == [4, 9] and result["accuracy"] == {"detail": 0.5, "all": 0.5}
    # Two of two words are right, four words are wanted: brevity exp(1 - 4/2).
    assert result["bleu"] == pytest.approx(100 * math.exp(-1.0))
    assert result["scores"] == [1.0, 0.0, 1.0, 0.0]


def test_tasks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="task must be one of vqa, caption, both, got 'captions'"):
        VQASourceArguments(task="captions")
    with pytest.raises(ValueError, match="known column mappings of Hub data sets have none"):
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
