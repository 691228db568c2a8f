"""One `LFQExpandedModel` shared by threads, compiled, and with its weights offloaded to CPU and disk."""

import copy
import sys
import threading

import pytest
import torch
from accelerate import dispatch_model

from tests.helpers.lfq_tools import OLD, language_model, vision_batch, vision_language_model
from tokcom_hf import LFQExpandedModel

BITS = 6


def expanded(base) -> LFQExpandedModel:
    torch.manual_seed(1)
    return LFQExpandedModel.from_base(base, output_dim=BITS, embedding_init_std=0.3).eval()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_threads_never_mix_requests(name):
    model, generator = expanded(language_model(name)), torch.Generator().manual_seed(0)
    requests = [torch.randint(1, OLD + 64, (1, 3 + i % 7), generator=generator) for i in range(40)]

    def answer(ids):
        if ids.shape[1] % 2:
            return model(input_ids=ids, labels=ids).loss.detach()
        return model.generate(ids, max_new_tokens=4, do_sample=False)

    expected = [answer(ids) for ids in requests]
    got = [None] * len(requests)

    def work(first):
        for index in range(first, len(requests), 4):
            got[index] = answer(requests[index])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_failed_call_leaves_nothing_behind():
    model = expanded(language_model("llama"))
    ids = torch.tensor([[5, 6, OLD + 3]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[OLD + 64]]), labels=torch.tensor([[1]]))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_compiling_changes_no_bit_and_breaks_no_graph(name):
    model = expanded(language_model(name))
    ids = torch.tensor([[5, 6, OLD + 3, 8], [OLD, 9, OLD + 63, 4]])
    with torch.no_grad():
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
        assert explained.graph_break_count == 0
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits)
    loss = model(input_ids=ids, labels=ids).loss
    explained = torch._dynamo.explain(model)(input_ids=ids, labels=ids, use_cache=False)
    # The chunked cross-entropy counts labels, so it does not fit one graph.
    assert explained.graph_break_count <= 4
    torch._dynamo.reset()
    assert torch.equal(compiled(input_ids=ids, labels=ids, use_cache=False).loss, loss)


# Bias in the head (phi), scaled embeddings (gemma3).
@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi", "gemma3", "llava"])
def test_offloaded_weights_give_the_same_logits_loss_and_ids(tmp_path, name):
    if name == "llava":
        base, inputs = vision_language_model(name), vision_batch(name)
        inputs["input_ids"][:, -3:] = torch.tensor([[OLD + 1, 7, OLD + 60]])
    else:
        base, inputs = language_model(name), {"input_ids": torch.tensor([[5, 6, OLD + 3, 8], [OLD, 9, OLD + 63, 4]])}
    base.save_pretrained(tmp_path / "base")
    model = expanded(str(tmp_path / "base"))
    labels, image = inputs["input_ids"], {"mode": "image", "num_image_tokens": 3, "do_sample": False}
    with torch.no_grad():
        logits, loss = model(**inputs).logits, model(**inputs, labels=labels).loss
        ids = model.generate(**inputs, **image)
    model.save_pretrained(tmp_path / "rows", include_base=False)
    model.save_pretrained(tmp_path / "full", include_base=True)
    folder = {"offload_folder": str(tmp_path / "offload")}
    auto = folder | {"device_map": "auto", "max_memory": {"cpu": 60_000}}
    # Tied tables have to be in one place; elsewhere the head is on disk.
    tied = name in ("llama_tied", "gemma3")
    body = [f"model.{name}" for name, _ in model.base.model.named_children()]
    places = {name: "disk" if "layers" in name or (not tied and "embed" in name) else "cpu" for name in body}
    places |= {"lm_head": "cpu" if tied else "disk"}
    parts = {f"base.{name}": where for name, where in places.items()} | {"lfq_rows": "disk"}
    offloaded = {
        "rows": LFQExpandedModel.from_pretrained(tmp_path / "rows", device_map=places, **folder),
        "rows, auto": LFQExpandedModel.from_pretrained(tmp_path / "rows", **auto),
        "full": LFQExpandedModel.from_pretrained(tmp_path / "full", device_map=parts, **folder),
        "full, auto": LFQExpandedModel.from_pretrained(tmp_path / "full", **auto),
        "dispatched": dispatch_model(copy.deepcopy(model), parts, offload_dir=str(tmp_path / "d"), main_device="cpu"),
    }
    for how, other in offloaded.items():
        assert any(parameter.is_meta for parameter in other.parameters()), how
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, logits), how
            torch.testing.assert_close(other(**inputs, labels=labels).loss, loss, atol=1e-6, rtol=1e-6)
            assert torch.equal(other.generate(**inputs, **image), ids), how
        with pytest.raises(ValueError, match="offloaded"):
            other.merge_and_unload()
    offloaded["rows"].save_pretrained(tmp_path / "again", include_base=True)
    with torch.no_grad():
        assert torch.equal(LFQExpandedModel.from_pretrained(tmp_path / "again")(**inputs).logits, logits)


@pytest.mark.parametrize("method", ["random", "mean"])
def test_rows_over_an_offloaded_base_start_like_any_others(tmp_path, method):
    language_model("phi").save_pretrained(tmp_path / "base")
    rows = []
    where = {"model": "cpu", "lm_head": "disk"}
    for options in ({}, {"device_map": where, "offload_folder": str(tmp_path / "offload")}):
        torch.manual_seed(0)
        model = LFQExpandedModel.from_base(
            str(tmp_path / "base"), output_dim=BITS, embedding_init_method=method, **options
        )
        rows.append(model.lfq_rows.state_dict())
    for key, value in rows[0].items():
        assert torch.equal(value, rows[1][key])


def test_tied_rows_get_both_gradients_where_hooks_move_arguments():
    model, ids = expanded(language_model("llama_tied")).train(), torch.tensor([[5, 6, OLD + 3, OLD + 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    expected = model.lfq_rows.embedding.grad.clone()
    model.zero_grad()
    dispatched = dispatch_model(model, {"base": "cpu", "lfq_rows": "cpu"}, force_hooks=True)
    dispatched(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(dispatched.lfq_rows.embedding.grad, expected)
