"""The KV cache goes by `cache` and by `past_key_values`, whatever this version of transformers calls it."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.pruned_vlm_tools import TEXT, batch, tiny_vlm
from tokcom_hf import LFQExpandedModel, PrunedVLM
from tokcom_hf.models.shared_cache_name import CACHE, cache_argument


def test_the_name_is_the_one_that_models_of_transformers_take():
    assert cache_argument(LlamaForCausalLM.forward) == CACHE
    assert cache_argument(lambda past_key_values=None: None) == "past_key_values"


@torch.no_grad()
def test_pruned_vlm_takes_and_gives_both_names_without_a_warning():
    model = PrunedVLM.from_base(tiny_vlm("llava"), strategy="uniform", keep=4).eval()
    inputs = batch("llava", images=(1, 1))
    new = torch.tensor([[7], [8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        first, second = (model(**inputs, use_cache=True) for _ in range(2))
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, return_dict_in_generate=True)
        assert torch.equal(model(new, cache=first.cache).logits, model(new, past_key_values=second.cache).logits)
    assert first.past_key_values is first["past_key_values"] is first["cache"] is first.get("past_key_values")
    assert "cache" in first and "past_key_values" in first
    assert beams[CACHE].segments
    with pytest.raises(ValueError, match="two names of one argument"):
        model(new, cache=first.cache, past_key_values=first.cache)


@torch.no_grad()
def test_lfq_takes_both_names_without_a_warning():
    torch.manual_seed(0)
    model = LFQExpandedModel.from_base(LlamaForCausalLM(LlamaConfig(**TEXT)), output_dim=3).eval()
    ids = torch.tensor([[5, 6, 101, 7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        caches = [model(ids[:, :3], use_cache=True)[CACHE] for _ in range(2)]
        steps = [
            model(ids[:, 3:], **{name: cache}).logits for name, cache in zip(("cache", "past_key_values"), caches)
        ]
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(steps[0], steps[1])
    torch.testing.assert_close(steps[0][:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)
