"""What was trained is what is loaded: PrunedVLM on disk, and what a file or a reference may not be."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig, LlavaModel, Trainer, TrainingArguments

from tests.helpers.pruned_vlm_tools import batch, tiny_vlm
from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    PrunedVLM,
    PrunedVLMConfig,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMerger,
    TokenMergerConfig,
)
from tokcom_hf.models.pruning_stream import PrunedCache
from tokcom_hf.trainers.pruning_lora import add_lora, merge_lora

MERGER = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
PRUNER = {"hidden_size": 32, "layers": [1], "keep_tokens": [5], "internal_size": 16}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    tiny_vlm("llava", layers=2).save_pretrained(folder)
    return folder


def with_heads(vlm, **loading):
    torch.manual_seed(0)
    return PrunedVLM.from_base(vlm, TokenMergerConfig(**MERGER), LayerPrunerConfig(**PRUNER), **loading).eval()


@torch.no_grad()
def logits(model):
    inputs = batch("llava", images=(1, 2))
    return model(**inputs).logits


def train(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    inputs = batch("llava", images=(1, 2))
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 99, -100)).loss.backward()
    optimizer.step()
    return model.eval()


def trained_then_frozen(model):
    train(model).requires_grad_(False)


def projector_edited_in_place(model):
    model.base.model.multi_modal_projector.linear_1.weight.data[0, 0] += 0.5


def lora_merged(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert wrapped.merge_and_unload() is model


def all_linear_and_a_saved_module_merged(model):
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["multi_modal_projector"])
    )
    train(wrapped)
    wrapped.merge_and_unload()


def cast_to_bfloat16(model):
    model.to(torch.bfloat16)


def cast_to_float16_and_back(model):
    model.half().float()


def resized(model):
    model.resize_token_embeddings(112)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 112


def untouched(model):
    pass


CHANGES = [
    untouched, trained_then_frozen, projector_edited_in_place, lora_merged, all_linear_and_a_saved_module_merged,
    cast_to_bfloat16, cast_to_float16_and_back, resized,
]  # fmt: skip

WAYS = [
    {}, {"include_base": True}, {"max_shard_size": "4KB"}, {"variant": "x"},
    {"max_shard_size": "4KB", "variant": "x"}, {"max_shard_size": "4KB", "variant": "x", "include_base": True},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_round_trips_of_round_trips_lose_nothing(vlm, tmp_path, change):
    model = with_heads(vlm)
    change(model)
    expected = logits(model)
    assert (change is untouched) == torch.equal(expected, logits(with_heads(vlm)))
    ways = WAYS if change in (untouched, trained_then_frozen) else [WAYS[0], WAYS[-1]]
    for place, options in enumerate(ways):
        given = {"variant": "x"} if "variant" in options else {}
        first, second = tmp_path / f"first{place}", tmp_path / f"second{place}"
        model.save_pretrained(first, **options)
        once = AutoModelForImageTextToText.from_pretrained(first, **given)
        once.save_pretrained(second)
        shutil.rmtree(first)
        twice = PrunedVLM.from_pretrained(second)
        for other in (once, twice):
            assert torch.equal(logits(other), expected)
            assert other.token_merger.log_scale.dtype == model.token_merger.log_scale.dtype
    # A base that is as it was stays a reference.
    saved = json.loads((tmp_path / "second0" / "config.json").read_text())
    by_reference = change in (untouched, cast_to_bfloat16)
    assert saved["base_included"] != by_reference
    assert saved["base_model_name_or_path"] == (str(vlm) if by_reference else None)
    if not by_reference:
        with pytest.raises(ValueError, match="include_base=False, but the base model is not what its reference"):
            model.save_pretrained(tmp_path / "refused", include_base=False)


def test_a_base_that_was_changed_before_it_was_wrapped_is_saved(vlm, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(vlm)
    torch.nn.init.normal_(base.lm_head.weight)
    model = PrunedVLM.from_base(base, strategy="uniform", keep=4).eval()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PrunedVLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_saving_over_the_base_or_an_earlier_save_keeps_everything(vlm, tmp_path):
    shutil.copytree(vlm, tmp_path / "here")
    model = PrunedVLM.from_base(tmp_path / "here", strategy="uniform", keep=4).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "here")
    assert torch.equal(logits(PrunedVLM.from_pretrained(tmp_path / "here")), expected)
    projector_edited_in_place(model)
    model.save_pretrained(tmp_path / "here", max_shard_size="4KB")
    assert torch.equal(logits(PrunedVLM.from_pretrained(tmp_path / "here")), logits(model))


def test_a_plain_trainer_saves_and_resumes_a_trained_base(vlm, tmp_path):
    rows = [
        {name: value[0] for name, value in batch("llava", images=(1,)).items()}
        | {"labels": batch("llava", images=(1,))["input_ids"][0]}
        for _ in range(4)
    ]
    options = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "learning_rate": 0.01}
    trainer = Trainer(
        with_heads(vlm), TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, **options), train_dataset=rows
    )
    trainer.train()
    whole = logits(trainer.model.eval())
    assert not torch.equal(whole, logits(with_heads(vlm)))
    assert torch.equal(logits(PrunedVLM.from_pretrained(tmp_path / "checkpoint-2")), whole)
    half = logits(PrunedVLM.from_pretrained(tmp_path / "checkpoint-1"))
    resumed = Trainer(
        with_heads(vlm), TrainingArguments(str(tmp_path / "b"), max_steps=1, **options), train_dataset=rows
    )
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed.model.eval()), half)


def test_peft_adapters_come_back(vlm, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["token_merger", "layer_pruner"])
    model = train(get_peft_model(with_heads(vlm), config))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(with_heads(vlm), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(with_heads(vlm)))
    # A checkpoint in the middle of training holds the adapters; only resuming reads it.
    inner = with_heads(vlm)
    get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"]))
    inner.save_pretrained(tmp_path / "middle")
    assert any(".lora_A." in name for name in load_file(tmp_path / "middle" / "model.safetensors"))
    with pytest.raises(ValueError, match="training checkpoint with LoRA adapters"):
        PrunedVLM.from_pretrained(tmp_path / "middle")


@pytest.mark.parametrize("included", [False, True])
def test_damaged_weights_are_refused_by_name(vlm, tmp_path, included):
    model = with_heads(vlm)
    if included:
        projector_edited_in_place(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "token_merger.feature_proj.weight"
    bad = {
        "missing": {key: value for key, value in good.items() if key != name},
        "unexpected": good | {"token_merger.other": torch.ones(1)},
        "NaN or infinite": good | {name: torch.full_like(good[name], float("inf"))},
        "torch.int8": good | {name: good[name].to(torch.int8)},
    }
    if included:
        bad["base.lm_head.weight"] = good | {"base.lm_head.weight": good["base.lm_head.weight"] * float("nan")}
    else:
        bad["base.lm_head.weight"] = good | {"base.lm_head.weight": torch.zeros(100, 32)}
        bad["shape"] = good | {name: good[name][:1]}
    for message, weights in bad.items():
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as error:
            PrunedVLM.from_pretrained(tmp_path)
        assert "token_merger." in str(error.value) or "base.lm_head" in str(error.value)
    file.unlink()
    with pytest.raises(OSError):
        PrunedVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "head",
    [
        TokenMerger(TokenMergerConfig(**MERGER)),
        LayerPruner(LayerPrunerConfig(**PRUNER)),
        PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16)),
    ],
    ids=lambda head: type(head).__name__,
)
def test_damaged_heads_are_refused_by_name(tmp_path, head):
    head.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = max(good, key=lambda key: good[key].numel())
    for weights in (
        {key: value for key, value in good.items() if key != name},
        good | {name: good[name].to(torch.int8)},
        good | {name: good[name] / 0.0},
    ):
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(name)):
            type(head).from_pretrained(tmp_path)
    save_file(good, file, metadata={"format": "pt"})
    assert torch.equal(type(head).from_pretrained(tmp_path, dtype=torch.float32).state_dict()[name], good[name])


def test_a_reference_is_another_plain_vlm_and_is_named_by_what_it_was(vlm, tmp_path):
    model = with_heads(vlm)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    values = json.loads(file.read_text())
    model.save_pretrained(tmp_path / "other")
    for reference, message in (
        ("./../x", "outside its folder"),
        ("../../etc", "outside its folder"),
        (str(tmp_path / "saved"), "names itself"),
        (str(tmp_path / "other"), "must be a plain VLM, got a PrunedVLM"),
        ("a/b/c", "neither a Hub name nor an absolute path"),
    ):
        file.write_text(json.dumps(values | {"base_model_name_or_path": reference}))
        with pytest.raises(ValueError, match=message):
            PrunedVLM.from_pretrained(tmp_path / "saved")
    file.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(OSError, match="If it moved"):
        PrunedVLM.from_pretrained(tmp_path / "saved")


def test_loading_options_reach_the_base_or_raise(vlm, tmp_path):
    model = with_heads(Path(vlm), dtype=torch.bfloat16, attn_implementation="eager", device_map={"": "cpu"})
    assert model.base.dtype == torch.bfloat16 and model.family.text_config._attn_implementation == "eager"
    assert {p.dtype for p in model.token_merger.parameters()} == {torch.float32}
    for loaded in (vlm, AutoModelForImageTextToText.from_pretrained(vlm)):
        with pytest.raises(TypeError, match="'strateg'"):
            PrunedVLM.from_base(loaded, strateg="divprune")
    with pytest.raises(TypeError, match="'dtype' with a loaded model"):
        PrunedVLM.from_base(AutoModelForImageTextToText.from_pretrained(vlm), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="wraps a LlavaForConditionalGeneration, got LlavaModel"):
        PrunedVLM.from_base(LlavaModel.from_pretrained(vlm))
    model.save_pretrained(tmp_path)
    again = PrunedVLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.base.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))
    wide = PrunedVLM.from_pretrained(tmp_path, dtype=torch.float32, pruning_mode="soft")
    assert wide.base.dtype == torch.float32 and wide.pruning_mode == "soft"
    with pytest.raises(TypeError, match="'pruning_mod'"):
        PrunedVLM.from_pretrained(tmp_path, pruning_mod="soft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_train_in_float32_over_a_half_precision_base(vlm, dtype):
    model = with_heads(vlm, dtype=dtype)
    model.base.requires_grad_(False)
    inputs = batch("llava", images=(1, 2))  # pixels in float32
    model.generate(**inputs, max_new_tokens=2)
    for mode in ("soft", "hard"):
        model.train()
        output = model(**inputs, labels=inputs["input_ids"], pruning_mode=mode)
        assert output.logits.dtype == dtype
        output.loss.backward()
    before = [p.detach().clone() for p in model.token_merger.parameters()]
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-5).step()
    moved = [
        (a != b).float().mean() for a, b in zip(model.token_merger.parameters(), before) if a.grad.abs().min() > 0
    ]
    assert moved and min(moved) > 0.95 and all(p.dtype == torch.float32 for p in model.layer_pruner.parameters())


def test_lora_trains_in_float32_over_a_bfloat16_base_and_merges_into_it(vlm, tmp_path):
    model = with_heads(vlm, dtype=torch.bfloat16).requires_grad_(False)
    add_lora(model, 2)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    before = {n: p.detach().clone() for n, p in trained.items()}
    model.train()
    for _ in range(2):
        inputs = batch("llava", images=(1, 2))
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        torch.optim.Adam(trained.values(), lr=2e-5).step()
    # Weights without a gradient do not move.
    assert min((p != before[n]).float().mean() for n, p in trained.items() if p.grad.abs().min() > 0) > 0.95
    model.eval()
    merge_lora(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PrunedVLM.from_pretrained(tmp_path)), logits(model))
    assert model.base.dtype == torch.bfloat16


def test_a_pruned_cache_is_not_cropped():
    assert not PrunedCache().is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        PrunedCache().crop(1)


def test_trust_in_a_model_is_no_trust_in_its_base_and_the_base_has_a_revision(vlm, tmp_path, monkeypatch):
    shutil.copytree(vlm, tmp_path / "base")
    marker = tmp_path / "ran"
    (tmp_path / "base" / "code.py").write_text(f"open({str(marker)!r}, 'w').write('')\n")
    file = tmp_path / "base" / "config.json"
    names = {"AutoConfig": "code.A", "AutoModelForImageTextToText": "code.B"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": names}))
    with_heads(tmp_path / "base").save_pretrained(tmp_path / "saved")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert not marker.exists()

    asked = {}

    def from_hub(name, **options):
        asked.update(name=name, **options)
        base = AutoModelForImageTextToText.from_pretrained(vlm, dtype=options.get("dtype", "auto"))
        base.config.name_or_path = name
        return base

    for module in ("pruning_building", "pruning_files"):
        monkeypatch.setattr(f"tokcom_hf.models.{module}.load_base", from_hub)
    model = with_heads("someone/vlm", revision="v1", token="secret")
    assert asked == {"name": "someone/vlm", "revision": "v1", "token": "secret"}
    model.save_pretrained(tmp_path / "hub")
    asked.clear()
    again = PrunedVLM.from_pretrained(tmp_path / "hub")
    assert asked["name"] == "someone/vlm" and asked["revision"] == "v1" and again.config.base_revision == "v1"
    assert torch.equal(logits(again), logits(model)) and not again.config.base_included


@pytest.mark.parametrize("include_base", [None, True])
def test_generation_settings_come_back(vlm, tmp_path, include_base):
    model = with_heads(vlm)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path, include_base=include_base)
    assert PrunedVLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3
    given = GenerationConfig(max_new_tokens=2)
    assert PrunedVLM.from_pretrained(tmp_path, generation_config=given).generation_config.max_new_tokens == 2


def test_a_state_dict_in_place_of_a_folder(vlm, tmp_path):
    with_heads(vlm).save_pretrained(tmp_path)
    model = PrunedVLM.from_pretrained(tmp_path)
    heads = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    for weights in (heads, model.state_dict()):
        again = PrunedVLM.from_pretrained(None, config=model.config, state_dict=weights)
        assert torch.equal(logits(again), logits(model))


def test_older_names_and_misspelt_ones_of_loading_and_saving(vlm, tmp_path):
    model = with_heads(vlm, torch_dtype=torch.bfloat16)
    assert model.base.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="'include_bse'"):
        model.save_pretrained(tmp_path, include_bse=True)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    loaded = PrunedVLM.from_pretrained(tmp_path, torch_dtype=torch.float32, attn_implementation="eager")
    assert loaded.base.dtype == torch.float32
    assert loaded.config._attn_implementation == loaded.base.config._attn_implementation == "eager"


def test_cut_files_and_other_shapes_are_named(vlm, tmp_path):
    trained = with_heads(vlm)
    projector_edited_in_place(trained)
    for number, model in enumerate((with_heads(vlm), trained)):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        config = PrunedVLMConfig.from_pretrained(folder)
        config.token_merger |= {"internal_size": 8}
        with pytest.raises(ValueError, match="token_merger"):
            PrunedVLM.from_pretrained(folder, config=config)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(OSError, match=r"model.safetensors is damaged or was cut short"):
            PrunedVLM.from_pretrained(folder)
