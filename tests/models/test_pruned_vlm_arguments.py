"""Every argument of PrunedVLM and its parts acts or raises."""

import inspect

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers.pruned_vlm_tools import FAMILIES, batch, tiny_vlm
from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMerger,
    TokenMergerConfig,
)
from tokcom_hf.models.shared_cache_name import CACHE

MERGER = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [5, 2], "internal_size": 16}
NEW = torch.tensor([[7, 8, 9], [10, 11, 12]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PrunedVLM.from_base(tiny_vlm("llava"), TokenMergerConfig(**MERGER), LayerPrunerConfig(**PRUNER)).eval()


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    hidden, question = torch.randn(2, 10, 32), torch.randn(2, 4, 32)
    merger, pruner = TokenMerger(TokenMergerConfig(**MERGER)), LayerPruner(LayerPrunerConfig(**PRUNER))
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16))
    return {
        merger.eval(): {"vision_features": torch.randn(2, 16, 16), "question_embeddings": question},
        pruner.eval(): {"layer_index": 1, "vision_hidden": hidden, "question_embeddings": question},
        critic.eval(): {"hidden_states": [torch.randn(2, 5, 32)] * 3, "answer_mask": torch.ones(2, 5)},
    }


@torch.no_grad()
def test_return_dict_is_followed(model, parts):
    inputs = batch("llava")
    everything = [(model, inputs), *parts.items()]
    for module, given in everything:
        whole, bare = module(**given, return_dict=True), module(**given, return_dict=False)
        assert type(bare) is tuple and len(bare) == len(whole.to_tuple())
        first = next(i for i, value in enumerate(bare) if torch.is_tensor(value) and value.is_floating_point())
        assert torch.equal(bare[first], whole.to_tuple()[first])
    module = TokenMerger(TokenMergerConfig(**MERGER, return_dict=False))
    assert type(module(torch.randn(1, 16, 16), torch.randn(1, 3, 32))) is tuple


def test_unknown_keywords_are_named(model, parts):
    inputs = batch("llava")
    for module, given in [(model, inputs), *parts.items()]:
        for name in ("pixel_valus", "output_hidden_state", "head_mask"):
            with pytest.raises(TypeError, match=name):
                module(**given, **{name: True})
        assert not any(p.kind == p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
    for name in ("max_new_token", "pixel_valus", "labels", "logits_to_keep", "inputs_embeds", "pixel_values_videos"):
        with pytest.raises((ValueError, TypeError), match="video" if "video" in name else name):
            model.generate(**inputs, **{name: torch.ones(1)})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hidden_states_come_from_forward_and_generate(family):
    model = PrunedVLM.from_base(tiny_vlm(family), strategy="uniform", keep=4).eval()
    inputs = batch(family, images=(1, 2))
    wanted = model.base(**inputs, output_hidden_states=True).hidden_states
    given = model(**inputs, output_hidden_states=True, pruning_mode="origin").hidden_states
    real = inputs["attention_mask"].bool()
    assert len(given) == len(wanted) == 5
    for ours, theirs in zip(given, wanted):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    for settings in (
        {"output_hidden_states": True},
        {"generation_config": GenerationConfig(output_hidden_states=True)},
    ):
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **settings)
        assert [len(step) for step in output.hidden_states] == [5, 5, 5]
        assert output.hidden_states[1][0].shape == (2, 1, 32)


def test_attentions_are_refused_in_words(model):
    inputs = batch("llava")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="returns no attentions"):
            call(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="returns no attentions"):
        model.generate(
            **inputs, generation_config=GenerationConfig(output_attentions=True, return_dict_in_generate=True)
        )
    eager = PrunedVLM.from_base(tiny_vlm("llava", "eager"), strategy="uniform", keep=4).eval()
    eager.set_attn_implementation("eager")
    eager.config.output_attentions = True
    for call in (eager, eager.generate):
        with pytest.raises(ValueError, match="returns no attentions"):
            call(**inputs)


@torch.no_grad()
def test_the_attention_implementation_reaches_the_base(model, tmp_path):
    inputs = batch("llava", images=(1, 2))
    fused = model(**inputs).logits
    assert model.family.text_config._attn_implementation == "sdpa"
    model.base.lm_head.weight.data[0] += 1.0  # so that the base is stored beside the heads
    model.save_pretrained(tmp_path)
    model.base.lm_head.weight.data[0] -= 1.0
    eager = PrunedVLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.base.model.vision_tower.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**inputs).logits[..., 1:], fused[..., 1:], atol=1e-5, rtol=1e-5)
    eager.set_attn_implementation("sdpa")
    assert eager.family.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**inputs).logits[..., 1:], fused[..., 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cached_turn_takes_text_and_labels_and_nothing_else(model):
    inputs = batch("llava", images=(1, 1))
    with pytest.raises(ValueError, match="pixel_values came with a filled cache"):
        model(NEW, cache=model(**inputs, use_cache=True).cache, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="holds a prompt pruned in mode 'hard'"):
        model(NEW, cache=model(**inputs, use_cache=True).cache, pruning_mode="soft")
    with pytest.raises(ValueError, match="takes no cache"):
        model.generate(NEW, **{CACHE: model(**inputs, use_cache=True).cache})
    labels = NEW.masked_fill(NEW == 8, -100)
    output = model(NEW, cache=model(**inputs, use_cache=True).cache, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)
    # Padding among the new tokens hides them: the shorter row is what it is alone.
    cache = model(**inputs, use_cache=True).cache
    padded = model(NEW, cache=cache, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    alone = {name: value[:1] for name, value in inputs.items()}
    single = model(NEW[:1, 1:], cache=model(**alone, use_cache=True).cache)
    torch.testing.assert_close(padded.logits[:1, 1:], single.logits, atol=1e-5, rtol=1e-5)
    # Positions given by hand act.
    places = torch.tensor([[60, 61, 62], [60, 61, 62]])
    moved = model(NEW, cache=model(**inputs, use_cache=True).cache, position_ids=places)
    assert moved.cache.next_position.tolist() == [63, 63] and not torch.allclose(moved.logits, output.logits)


@torch.no_grad()
def test_logits_to_keep_counts_or_names_places(model):
    inputs = batch("llava")
    everything = model(**inputs).logits
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, everything[:, -2:])
    assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, everything[:, [0, 5]])
    with pytest.raises(ValueError, match="needs input_ids"):
        model(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    size = {"llava": 16, "internvl": 64, "qwen2_5_vl": 32}[family]
    merger = TokenMergerConfig(**MERGER | {"feature_size": size}, gumbel_noise=False)
    torch.manual_seed(0)
    model = PrunedVLM.from_base(tiny_vlm(family), merger, LayerPrunerConfig(**PRUNER, gumbel_noise=False)).train()
    inputs = batch(family)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        for mode in ("soft", "hard"):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], pruning_mode=mode).loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for plain, saving in zip(grads[:2], grads[2:]):
        assert plain.keys() == saving.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(saving[name], gradient, msg=name)


@pytest.mark.parametrize("strategy", ["heads", "fastv", "visionzip"])
@torch.no_grad()
def test_offloaded_to_cpu_or_disk_it_computes_the_same(tmp_path, strategy):
    tiny_vlm("llava").save_pretrained(tmp_path / "vlm")
    stages = {"strategy": strategy, "keep": 4}
    if strategy == "heads":
        stages = {"token_merger": TokenMergerConfig(**MERGER), "layer_pruner": LayerPrunerConfig(**PRUNER)}
    torch.manual_seed(0)
    model = PrunedVLM.from_base(tmp_path / "vlm", **stages).eval()
    model.save_pretrained(tmp_path / "saved")
    inputs = batch("llava", images=(1, 2))
    expected, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
    disk = {
        "model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu",
    }  # fmt: skip
    heads = {"token_merger": "disk", "layer_pruner": "disk"} if strategy == "heads" else {}
    for device_map in ("auto", {"": "cpu"}, disk):
        other = PrunedVLM.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert torch.equal(other(**inputs).logits, expected)
        assert torch.equal(other.generate(**inputs, max_new_tokens=3, do_sample=False), ids)
    # The same where the base is stored beside the heads.
    model.base.lm_head.weight.data[0] += 1.0
    model.save_pretrained(tmp_path / "whole")
    other = PrunedVLM.from_pretrained(
        tmp_path / "whole", device_map={f"base.{name}": place for name, place in disk.items()} | heads,
        offload_folder=str(tmp_path / "offload"),
    )  # fmt: skip
    assert any(p.is_meta for p in other.parameters())
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert other.generate(**inputs, max_new_tokens=3, do_sample=False).shape == ids.shape
    model.base.lm_head.weight.data[0] -= 1.0
    other = PrunedVLM.from_pretrained(tmp_path / "saved", device_map=disk, offload_folder=str(tmp_path / "offload"))
    # Saved from there it refers to the same base.
    other.save_pretrained(tmp_path / "again")
    assert torch.equal(PrunedVLM.from_pretrained(tmp_path / "again")(**inputs).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_takes_float32_pixels(family, dtype):
    model = PrunedVLM.from_base(tiny_vlm(family).to(dtype), strategy="divprune", keep=4).eval()
    output = model(**batch(family, images=(1, 2)))
    assert output.logits.dtype == dtype and torch.isfinite(output.logits).all()


@torch.no_grad()
def test_guidance_and_assistance_while_generating(model):
    inputs = batch("llava", images=(1, 1))
    model.generate(**inputs, max_new_tokens=2)
    report = model.token_report()
    model.generate(**inputs, max_new_tokens=2, guidance_scale=2.0, negative_prompt_ids=NEW)
    assert model.token_report() == report
    one = {name: value[:1] for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"(?i)assisted decoding"):
        model.generate(**one, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_prompts_that_are_none_are_named(model):
    ids = torch.tensor([[5, 6, 7]])
    for call in (lambda ids: model(input_ids=ids), lambda ids: model.generate(ids, max_new_tokens=1)):
        for wrong in (ids.tolist(), ids.float()):
            with pytest.raises(TypeError, match="must be a tensor of token ids"):
                call(wrong)
        for wrong in (ids[0], ids[:0], ids[:, :0]):
            with pytest.raises(ValueError, match="both at least 1"):
                call(wrong)
    with pytest.raises(TypeError, match="must be a GenerationConfig, got dict"):
        model.generate(ids, generation_config={"max_new_tokens": 1})


def test_parts_that_do_not_act_or_fit_are_named(model):
    vlm = tiny_vlm("llava")
    with pytest.raises(ValueError, match="keep=4 is the budget of a training-free strategy"):
        PrunedVLM.from_base(vlm, keep=4)
    with pytest.raises(TypeError, match="got NoneType"):
        PrunedVLM.from_base(None)
    with pytest.raises(TypeError, match="got dict; write TokenMergerConfig"):
        PrunedVLM.from_base(vlm, token_merger=MERGER)
    inputs = batch("llava")
    for name in ("attention_mask", "labels"):
        with pytest.raises(ValueError, match=f"{name} must have the shape of input_ids"):
            model(**inputs | {name: torch.ones(2, 3, dtype=torch.long)})
