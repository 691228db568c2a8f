"""Requests share a PrunedVLM and nothing else: modes, reports and random numbers belong to a call."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers.pruned_vlm_tools import batch, tiny_vlm
from tokcom_hf import LayerPrunerConfig, PrunedVLM, TokenMergerConfig

MERGER = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
PRUNER = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [5, 2], "internal_size": 16}


def models():
    torch.manual_seed(3)
    yield (
        PrunedVLM.from_base(
            tiny_vlm("llava"), TokenMergerConfig(**MERGER, attention_guided=True), LayerPrunerConfig(**PRUNER)
        ).eval(),
        ("origin", "merge_only", "soft", "hard"),
    )
    for strategy in ("fastv", "visionzip", "random"):
        yield PrunedVLM.from_base(tiny_vlm("llava"), strategy=strategy, keep=4).eval(), ("origin", "hard")


def ask(model, mode, seed):
    output = model.generate(
        **batch("llava", images=(1, 2), seed=seed),
        max_new_tokens=3,
        do_sample=False,
        pruning_mode=mode,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.token_report == output["token_report"] == model.token_report()
    return output.sequences, torch.stack(output.logits), output.token_report


def test_threads_with_different_modes_get_what_they_get_alone():
    torch.set_num_threads(1)
    for model, modes in models():
        requests = [(mode, seed) for seed in range(4) for mode in modes] * 2
        before = model.config.to_dict()
        alone = [ask(model, *request) for request in requests]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda request, model=model: ask(model, *request), requests))
        for (ids, logits, report), (same_ids, same_logits, same_report) in zip(alone, together):
            assert torch.equal(ids, same_ids) and torch.equal(logits, same_logits) and report == same_report
        assert model.config.to_dict() == before and model.pruning_mode == "hard"


@torch.no_grad()
def test_the_report_is_the_calling_threads_last_prompt():
    model, _ = next(models())
    model(**batch("llava", images=(1, 1)), pruning_mode="merge_only")
    mine = model.token_report()
    assert mine["vision_tokens_per_layer"] == [8.0] * 4
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="last prompt"):
            pool.submit(model.token_report).result()
        pool.submit(lambda: model(**batch("llava", images=(2, 2)))).result()
        assert pool.submit(model.token_report).result()["vision_tokens"] == 32
    assert model.token_report() == mine
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="last prompt"):
            other.token_report()
        assert torch.equal(other(**batch("llava")).logits, model(**batch("llava")).logits)


@torch.no_grad()
def test_random_tokens_depend_on_seed_and_question_only():
    inputs = batch("llava", images=(1, 2))
    model = PrunedVLM.from_base(tiny_vlm("llava"), strategy="random", keep=4).eval()
    state = torch.random.get_rng_state()
    places = model(**inputs).kept_index[0]
    assert torch.equal(places, model(**inputs).kept_index[0]) and torch.equal(state, torch.random.get_rng_state())
    # The second row alone keeps the same tokens (it is the longer one, so nothing moves).
    row = {name: value[1:] for name, value in inputs.items()}
    assert torch.equal(places[1], model(**row).kept_index[0][0])
    first, second = ((places[1] >= start) & (places[1] < start + 16) for start in (3, 20))
    assert (places[1][first] - 3).tolist() != (places[1][second] - 20).tolist()
    other = PrunedVLM.from_base(tiny_vlm("llava"), strategy="random", keep=4, strategy_seed=1).eval()
    assert not torch.equal(places, other(**inputs).kept_index[0])
