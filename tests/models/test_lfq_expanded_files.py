"""Saving, loading in other processes, merging, and LoRA from peft on top."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from tests.helpers.lfq_tools import OLD, language_model, vision_batch, vision_language_model
from tokcom_hf import LFQExpandedModel

BITS = 6
IDS = torch.tensor([[5, 6, 7, OLD + 3, OLD + 40], [8, 9, 10, OLD + 1, OLD + 63]])


def expanded(base, folder=None):
    """Expanded from memory, or from a saved base, with rows that matter."""
    torch.manual_seed(1)
    if folder is not None:
        base.save_pretrained(folder)
        base = type(base).from_pretrained(folder)
    return LFQExpandedModel.from_base(base, output_dim=BITS, embedding_init_std=0.2).eval()


def weights_in(folder) -> dict[str, tuple]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def run(code: str, **environment) -> str:
    """Output of a fresh process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "phi"])
@pytest.mark.parametrize("style", ["adapter", "full"])
def test_reload_is_exact(tmp_path, name, style):
    model = expanded(language_model(name), tmp_path / "base")
    model.freeze_base()
    model.save_pretrained(tmp_path / "saved", include_base=style == "full")
    stored = weights_in(tmp_path / "saved")
    rows = {key for key in stored if key.startswith("lfq_rows.")}
    assert rows and (len(stored) > len(rows)) == (style == "full")
    # A tied base keeps one table in the file, and no file holds a row twice.
    assert sum(shape == (OLD, 32) for shape in stored.values()) == (
        0 if style == "adapter" else 1 if name in ("llama_tied", "gpt2") else 2
    )
    for auto_class in (AutoModel, AutoModelForCausalLM):
        again = auto_class.from_pretrained(tmp_path / "saved")
        assert isinstance(again, LFQExpandedModel) and again.lfq_token_range == (OLD, OLD + 64)
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} >= rows


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_vision_language_models_reload_exactly(tmp_path, family):
    model, inputs = expanded(vision_language_model(family), tmp_path / "base"), vision_batch(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        for include_base in (True, False):
            model.save_pretrained(tmp_path / str(include_base), include_base=include_base)
            again = AutoModelForImageTextToText.from_pretrained(tmp_path / str(include_base))
            assert torch.equal(again(**inputs).logits, expected)


def test_what_is_saved_follows_what_trains(tmp_path):
    model = expanded(language_model("llama"), tmp_path / "base")
    # The body may train: it is saved.
    model.save_pretrained(tmp_path / "all")
    assert len(weights_in(tmp_path / "all")) > 2
    model.freeze_base()
    model.save_pretrained(tmp_path / "rows")
    assert set(weights_in(tmp_path / "rows")) == {"lfq_rows.embedding", "lfq_rows.head"}
    assert json.loads((tmp_path / "rows" / "config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    memory = expanded(language_model("llama"))
    memory.freeze_base()
    memory.save_pretrained(tmp_path / "memory")
    assert len(weights_in(tmp_path / "memory")) > 2
    with pytest.raises(ValueError, match="include_base=False needs a base model that was loaded"):
        memory.save_pretrained(tmp_path / "no", include_base=False)


def test_a_base_below_the_saved_folder_moves_along(tmp_path):
    model = expanded(language_model("llama"), tmp_path / "saved" / "base")
    model.save_pretrained(tmp_path / "saved", include_base=False)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = LFQExpandedModel.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi"])
def test_a_merged_model_is_a_stock_model(tmp_path, name):
    model = expanded(language_model(name))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(language_model(name))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.lfq_start_token_id, config.lfq_output_dim) == (OLD + 64, OLD, BITS)


def test_a_merged_vision_language_model_is_a_stock_model(tmp_path):
    model, inputs = expanded(vision_language_model("llava")), vision_batch("llava")
    with torch.no_grad():
        expected = model(**inputs).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_fresh_processes_generate_the_same_ids_with_and_without_the_package(tmp_path):
    model = expanded(language_model("llama"), tmp_path / "base")
    model.save_pretrained(tmp_path / "full", include_base=True)
    model.save_pretrained(tmp_path / "rows", include_base=False)
    options = {"mode": "image", "num_image_tokens": 8, "do_sample": False}
    expected = str(model.generate(IDS, **options).tolist())
    body = f"""
import torch
from transformers import AutoModelForCausalLM
for folder in ("full", "rows"):
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + folder, trust_remote_code=REMOTE)
    ids = str(model.generate(torch.tensor({IDS.tolist()}), **{options}).tolist())
    print(ids)
    assert ids == {expected!r}, folder
"""
    assert run("import tokcom_hf" + body.replace("REMOTE", "False")) == expected
    outside = "import sys\nsys.modules['tokcom_hf'] = None" + body.replace("REMOTE", "True")
    assert run(outside, HF_HOME=str(tmp_path / "cache")) == expected


def test_lora_of_peft_with_the_split_rows(tmp_path):
    base = language_model("llama")
    base.save_pretrained(tmp_path / "base")
    fresh = lambda: LFQExpandedModel.from_base(  # noqa: E731
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), output_dim=BITS, embedding_init_method="zeros"
    )
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lfq_rows"])
    model = get_peft_model(fresh(), config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lfq_rows" in n for n in trainable) and any("lora_" in n for n in trainable)
    assert all("lfq_rows" in n or "lora_" in n for n in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.05)
    first = None
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.7 * first
    model.eval()
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "lora").eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, expected)
        # LoRA merged, then the vocabulary merged: a plain Llama.
        plain = again.merge_and_unload().merge_and_unload()
        assert type(plain) is LlamaForCausalLM
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(plain.lm_head.weight[:OLD], base.lm_head.weight)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llava"])
def test_lora_on_all_linear_layers_leaves_the_vocabulary_out(tmp_path, name):
    vision = name == "llava"
    inputs = vision_batch(name) if vision else {"input_ids": IDS}
    base = vision_language_model(name) if vision else language_model(name)
    base.save_pretrained(tmp_path / "base")

    def fresh():
        torch.manual_seed(1)
        return LFQExpandedModel.from_base(str(tmp_path / "base"), output_dim=BITS, embedding_init_std=0.2)

    config = {"r": 2, "modules_to_save": ["lfq_rows"], "init_lora_weights": False}
    model = get_peft_model(fresh(), LoraConfig(target_modules="all-linear", **config))
    names = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert any("mlp" in key for key in names) and not any("head" in key or "lfq_rows" in key for key in names)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "lora").eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        plain = again.merge_and_unload().merge_and_unload()
        assert type(plain) is type(base) and type(plain.get_output_embeddings()) is torch.nn.Linear
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    # LoRA on the head would know old ids only.
    with pytest.raises(ValueError, match="OldHead"):
        get_peft_model(fresh(), LoraConfig(target_modules=["q_proj", "lm_head"], **config))


def test_foreign_and_broken_checkpoints(tmp_path):
    model = expanded(language_model("llama"), tmp_path / "base")
    model.save_pretrained(tmp_path / "rows", include_base=False)
    config = tmp_path / "rows" / "config.json"
    values = json.loads(config.read_text())

    def load_with(**changes):
        config.write_text(json.dumps(values | changes))
        return LFQExpandedModel.from_pretrained(tmp_path / "rows")

    with pytest.raises(ValueError, match="belong to another base model"):
        load_with(lfq_start_token_id=OLD - 1)
    with pytest.raises(ValueError, match="do not fit output_dim=5"):
        load_with(output_dim=5)
    with pytest.raises(ValueError, match="bit_order='most_significant_first', which was removed"):
        load_with(bit_order="most_significant_first")
    with pytest.raises(OSError, match="set base_model_name_or_path in"):
        load_with(base_model_name_or_path=str(tmp_path / "moved"))
    config.write_text(json.dumps(values))
    save_file({"lfq_rows.embedding": torch.zeros(64, 8)}, tmp_path / "rows" / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected embedding \(64, 32\), head \(64, 32\), got embedding \(64, 8\)"):
        LFQExpandedModel.from_pretrained(tmp_path / "rows")
    # Another model's folder is not an LFQ checkpoint.
    with pytest.raises(ValueError, match="no LFQ checkpoint"):
        LFQExpandedModel.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "full", include_base=True)
    state = {k: v for k, v in model.state_dict().items() if k != "lfq_rows.head"}
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "full" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        LFQExpandedModel.from_pretrained(tmp_path / "full")


def test_loading_in_another_dtype(tmp_path):
    model = expanded(language_model("llama"), tmp_path / "base")
    for include_base in (True, False):
        model.save_pretrained(tmp_path / str(include_base), include_base=include_base)
        again = LFQExpandedModel.from_pretrained(tmp_path / str(include_base), dtype=torch.bfloat16)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert again(input_ids=IDS, labels=IDS).loss.isfinite()
