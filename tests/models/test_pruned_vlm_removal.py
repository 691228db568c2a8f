"""Hard mode removes tokens: it equals an uncached model in which the removed tokens are masked out."""

import pytest
import torch

from tests.helpers.pruned_vlm_tools import FAMILIES, TOKENS, batch, tiny_vlm
from tokcom_hf import LayerPrunerConfig, PrunedVLM, TokenMergerConfig


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pruned(family, attention="sdpa", tokens=(9, 4), layers=(1, 3), **options):
    pruner = LayerPrunerConfig(
        hidden_size=32, layers=list(layers), keep_tokens=list(tokens), internal_size=16, num_attention_heads=2
    )
    torch.manual_seed(1)
    model = PrunedVLM.from_base(tiny_vlm(family, attention), layer_pruner=pruner, **options).eval()
    with torch.no_grad():
        for parameter in model.layer_pruner.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def true_positions(model, inputs):
    images = {k: v for k, v in inputs.items() if k == "image_grid_thw"}
    return model.family.positions(inputs["input_ids"], inputs["attention_mask"], images)


@torch.no_grad()
def masked_reference(model, inputs, kept_index, new_ids):
    """Logits of the new positions from the base model, uncached; layer by layer the removed places are masked keys."""
    base = model.base
    ids = torch.cat([inputs["input_ids"], new_ids], 1)
    prompt, length = inputs["input_ids"].shape[1], ids.shape[1]
    grown = torch.ones_like(new_ids)
    mask = torch.cat([inputs["attention_mask"], grown], 1)
    positions = true_positions(model, inputs)
    start = positions.reshape(-1, *positions.shape[-2:]).amax((0, -1))[:, None] + 1
    new = start + torch.arange(new_ids.shape[1])
    positions = torch.cat([positions, new.expand(*positions.shape[:-1], -1)], -1)

    def layer_mask(index):
        allowed = torch.zeros(len(ids), length, dtype=torch.bool)
        for row, places in enumerate(index):
            allowed[row, places[places >= 0]] = True
        allowed &= mask.bool()
        allowed[:, prompt:] = True
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        both = causal & allowed[:, None, :] | torch.eye(length, dtype=torch.bool)
        return torch.zeros(len(ids), 1, length, length).masked_fill(~both[:, None], torch.finfo(torch.float32).min)

    handles = []
    for layer, index in zip(model.family.text_model.layers, kept_index):

        def swap(module, args, kwargs, index=index):
            return args, kwargs | {"attention_mask": layer_mask(index)}

        handles.append(layer.register_forward_pre_hook(swap, with_kwargs=True))
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    try:
        logits = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **images).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[:, prompt:]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hard_mode_equals_masking_over_nine_decoded_tokens(family, side, attention):
    model = pruned(family, attention)
    inputs = batch(family, side, images=(1, 2, 1))
    output = model(**inputs, use_cache=True)
    keep_sets = [set(row[row >= 0].tolist()) for row in output.kept_index[-1]]
    assert len(keep_sets[0] & set(range(3, 3 + TOKENS))) < TOKENS and keep_sets[0] != keep_sets[2]
    generator = torch.Generator().manual_seed(3)
    new_ids = torch.randint(1, 90, (3, 9), generator=generator)
    ours = torch.cat([model(new_ids[:, t : t + 1], cache=output.cache).logits for t in range(9)], dim=1)
    reference = masked_reference(model, inputs, output.kept_index, new_ids)
    assert (ours - reference).abs().max() < 1e-4
    unpruned = masked_reference(model, inputs, [output.kept_index[0]] * 4, new_ids)
    assert (ours - unpruned).abs().max() > 1e-2, "the test would not notice a model that prunes nothing"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removed_tokens_are_not_in_the_cache(family):
    model = pruned(family)
    inputs = batch(family, images=(1, 1))
    cache = model(**inputs, use_cache=True).cache
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    text = [int(((row != 99) & (mask == 1)).sum()) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    assert lengths[1:] == [max(text) + 9, max(text) + 9, max(text) + 4]
    report = model.token_report()
    assert report["vision_tokens_per_layer"] == [16, 9, 9, 4]
    assert report["kv_bytes"] < report["kv_bytes_origin"] and report["flops_ratio"] < 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_equals_the_unmodified_model_exactly(family, attention):
    model = pruned(family, attention, tokens=(16, 16))
    for side in ("left", "right"):
        inputs = batch(family, side, images=(1, 2))
        positions = {} if family == "qwen2_5_vl" else {"position_ids": true_positions(model, inputs)}
        expected = model.base(**inputs, **positions).logits
        real = inputs["attention_mask"].bool()
        assert torch.equal(model(**inputs).logits[real], expected[real])
        assert torch.equal(model(**inputs, pruning_mode="origin").logits[real], expected[real])
    inputs = batch(family, images=(1, 2))
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **greedy), model.base.generate(**inputs, **greedy))
    inputs = batch(family, images=(1, 1))
    beams = greedy | {"num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), model.base.generate(**inputs, **beams))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_soft_mask_converges_to_hard(family):
    model = pruned(family)
    inputs = batch(family, images=(1, 2))
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] != 99)
    hard = model(**inputs).logits[real].log_softmax(-1)
    gaps = []
    for temperature in (1.0, 0.1, 1e-4):
        model.temperature = temperature
        soft = model(**inputs, pruning_mode="soft").logits[real].log_softmax(-1)
        gaps.append(float((hard.exp() * (hard - soft)).sum(-1).mean()))
    assert gaps[0] > gaps[1] > gaps[2] and abs(gaps[2]) < 1e-5


@torch.no_grad()
def test_batched_generation_equals_single_rows():
    model = pruned("llava")
    inputs = batch("llava", images=(1, 1, 1))
    together = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        single = {"input_ids": inputs["input_ids"][row, real][None], "pixel_values": inputs["pixel_values"][row, None]}
        assert torch.equal(model.generate(**single, max_new_tokens=8, do_sample=False)[0, -8:], together[row])


@torch.no_grad()
def test_merged_prompt_decodes_as_it_would_without_a_cache():
    merger = TokenMergerConfig(feature_size=16, question_size=32, target_merge_tokens=6, internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm("llava"), token_merger=merger).eval()
    inputs = batch("llava", images=(1, 2))
    output = model(**inputs, use_cache=True)
    new_ids = torch.randint(1, 90, (2, 8))
    steps = torch.cat([model(new_ids[:, t : t + 1], cache=output.cache).logits for t in range(8)], dim=1)
    # Uncached: the new tokens as part of the prompt, hidden from the merger as labels are.
    prompt = inputs["input_ids"].shape[1]
    whole = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], new_ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new_ids)], 1),
    }
    labels = torch.full_like(whole["input_ids"], -100)
    labels[:, prompt:] = new_ids
    assert (model(**whole, labels=labels).logits[:, prompt:] - steps).abs().max() < 1e-4
    assert model.token_report()["vision_tokens"] == 24


def test_bfloat16_and_gradients_reach_every_head():
    merger = TokenMergerConfig(feature_size=16, question_size=32, target_merge_tokens=10, internal_size=16)
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_tokens=[6, 3], internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm("llava").to(torch.bfloat16), token_merger=merger, layer_pruner=pruner)
    inputs = batch("llava", images=(1, 2))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model.train()
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 99, -100).roll(0)[:, :])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    output = model(**inputs, labels=labels, pruning_mode="soft")
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in [*model.token_merger.named_parameters(), *model.layer_pruner.named_parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
