"""What was trained is what is loaded: an `LFQExpandedModel` saved, loaded, saved elsewhere and loaded again.

And what `from_pretrained` refuses: foreign, broken and quantized weights, misspelt keywords, code that nobody trusted.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tests.helpers.lfq_tools import OLD, language_model, vision_batch, vision_language_model
from tokcom_hf import LFQExpandedConfig, LFQExpandedModel

BITS = 6
IDS = torch.tensor([[5, 6, 7, OLD + 3, OLD + 40], [8, 9, 10, OLD + 1, OLD + 63]])


@pytest.fixture(scope="module", params=["llama_tied", "llava"])
def base(request, tmp_path_factory):
    """Folder of a base model, and inputs for it that hold LFQ ids."""
    folder = tmp_path_factory.mktemp(request.param)
    vision = request.param == "llava"
    (vision_language_model("llava") if vision else language_model(request.param)).save_pretrained(folder)
    inputs = vision_batch("llava") if vision else {"input_ids": IDS.clone()}
    inputs["input_ids"][:, -2:] = torch.tensor([[OLD + 5, OLD + 60], [OLD + 1, OLD]])
    return folder, inputs


def expanded(folder) -> LFQExpandedModel:
    torch.manual_seed(1)
    return LFQExpandedModel.from_base(folder, output_dim=BITS, embedding_init_std=0.2)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def step(model, inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()


def trained(model, inputs):
    step(model, inputs)
    return model


def trained_then_frozen(model, inputs):
    step(model, inputs)
    return model.requires_grad_(False)


def rows_trained(model, inputs):
    model.freeze_base()
    step(model, inputs)
    return model


def lora_merged(model, inputs):
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lfq_rows"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    step(tuned, inputs)
    return tuned.merge_and_unload()


def cast(model, inputs):
    return trained_then_frozen(model, inputs).to(torch.bfloat16)


def rows_cast(model, inputs):
    return rows_trained(model, inputs).to(torch.float16)


def edited_outside(model, inputs):
    """A change that no `requires_grad` tells of."""
    model.requires_grad_(False)
    next(iter(model.base.parameters())).add_(0.1)
    return model


WAYS = [trained, trained_then_frozen, rows_trained, lora_merged, cast, rows_cast, edited_outside]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB", "variant": "fp16"}], ids=["plain", "shards"])
def test_saved_loaded_saved_elsewhere_and_loaded(tmp_path, base, way, options):
    folder, inputs = base
    model = way(expanded(folder), inputs)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "first", **options)
    names = {"variant": options["variant"]} if options else {}
    first = LFQExpandedModel.from_pretrained(tmp_path / "first", **names)
    assert torch.equal(logits(first, inputs), expected)
    first.requires_grad_(False)
    first.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    if way is rows_trained or options:
        # Nothing of the first folder is needed, unless it holds the base.
        shutil.rmtree(tmp_path / "first")
    second = LFQExpandedModel.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(second, inputs), expected)
    dtypes = [{name: p.dtype for name, p in m.named_parameters()} for m in (model, second)]
    assert dtypes[0] == dtypes[1]


def test_an_untouched_frozen_base_is_a_reference(tmp_path, base):
    folder, inputs = base
    model = rows_trained(expanded(folder), inputs)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= {"lfq_rows.embedding", "lfq_rows.head"}
    next(iter(model.base.parameters())).data.add_(0.1)
    with pytest.raises(ValueError, match="include_base=False would lose weights"):
        model.save_pretrained(tmp_path, include_base=False)


def test_a_base_inside_the_folder_is_found_from_a_second_folder(tmp_path, base):
    folder, inputs = base
    shutil.copytree(folder, tmp_path / "first" / "base")
    model = expanded(tmp_path / "first" / "base")
    model.freeze_base()
    model.save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "config.json").read_text())["base_model_name_or_path"] == "./base"
    again = LFQExpandedModel.from_pretrained(tmp_path / "first")
    again.freeze_base()
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(LFQExpandedModel.from_pretrained(tmp_path / "second"), inputs), logits(model, inputs))


def test_float32_rows_stay_float32_over_a_bfloat16_base(tmp_path, base):
    folder, inputs = base
    model = LFQExpandedModel.from_base(folder, output_dim=BITS, dtype=torch.bfloat16)
    assert model.base.dtype == torch.bfloat16 and model.lfq_rows.embedding.dtype == torch.float32
    before = model.lfq_rows.embedding.detach().clone()
    model.freeze_base()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    # Every row is in the softmax, so every row moves.
    assert (model.lfq_rows.embedding != before).float().mean() > 0.99 or model.lfq_rows.head is not None
    expected = logits(model, inputs)
    for include_base in (False, True):
        model.save_pretrained(tmp_path, include_base=include_base)
        again = LFQExpandedModel.from_pretrained(tmp_path)
        assert again.base.dtype == torch.bfloat16 and again.lfq_rows.embedding.dtype == torch.float32
        assert torch.equal(logits(again, inputs), expected)


def test_shards_of_an_earlier_save_do_not_survive(tmp_path, base):
    folder, inputs = base
    model = expanded(folder)
    model.save_pretrained(tmp_path, include_base=True)
    with torch.no_grad():
        model.lfq_rows.embedding.add_(1)
    model.save_pretrained(tmp_path, include_base=False, max_shard_size="4KB")
    assert torch.equal(logits(LFQExpandedModel.from_pretrained(tmp_path), inputs), logits(model, inputs))
    with torch.no_grad():
        model.lfq_rows.embedding.add_(1)
    model.save_pretrained(tmp_path, include_base=False)
    assert torch.equal(logits(LFQExpandedModel.from_pretrained(tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("include_base", [False, True])
def test_broken_weights_are_named(tmp_path, base, include_base):
    expanded(base[0]).save_pretrained(tmp_path, include_base=include_base)
    good = load_file(tmp_path / "model.safetensors")

    def load_with(changes: dict, without=()):
        tensors = {key: value for key, value in (good | changes).items() if key not in without}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return LFQExpandedModel.from_pretrained(tmp_path)

    rows = good["lfq_rows.embedding"]
    for value in (float("nan"), float("inf")):
        broken = rows.clone()
        broken[3, 4] = value
        with pytest.raises(ValueError, match=r"lfq_rows\.embedding are NaN or infinite"):
            load_with({"lfq_rows.embedding": broken})
    for dtype in (torch.int8, torch.bool):
        with pytest.raises(ValueError, match=r"lfq_rows\.embedding is stored as"):
            load_with({"lfq_rows.embedding": rows.to(dtype)})
    with pytest.raises(ValueError, match=r"base\.extra"):
        load_with({"base.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"lacks weights|do not fit"):
        load_with({"other": torch.zeros(1)} if include_base else {}, without=("lfq_rows.embedding",))


@pytest.mark.parametrize("include_base", [False, True])
def test_a_misspelt_keyword_is_named(tmp_path, base, include_base):
    folder, _ = base
    expanded(folder).save_pretrained(tmp_path, include_base=include_base)
    with pytest.raises(TypeError, match="dtpye"):
        LFQExpandedModel.from_pretrained(tmp_path, dtpye=torch.bfloat16)
    with pytest.raises(TypeError, match="dtpye"):
        LFQExpandedModel.from_base(folder, output_dim=BITS, dtpye=torch.bfloat16)
    # A field of the configuration is overridden, as everywhere in transformers.
    again = LFQExpandedModel.from_pretrained(tmp_path, text_vocab_size=OLD - 4)
    assert again.config.text_vocab_size == OLD - 4
    again = LFQExpandedModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.base.config._attn_implementation == "eager"


def test_adapters_that_are_not_merged_are_refused(tmp_path, base):
    model = expanded(base[0])
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters that are not merged"):
        tuned.base_model.model.save_pretrained(tmp_path)


REMOTE = {
    "configuration_other.py": """
from transformers import LlamaConfig
open({mark!r}, "a").write("ran")
class OtherConfig(LlamaConfig):
    model_type = "other_remote_for_tests"
""",
    "modeling_other.py": """
from transformers import LlamaForCausalLM
from .configuration_other import OtherConfig
class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
""",
}


def test_trust_in_the_folder_does_not_extend_to_its_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, other = tmp_path / "mark", tmp_path / "other"
    plain = language_model("llama")
    plain.save_pretrained(other)
    for name, code in REMOTE.items():
        (other / name).write_text(code.format(mark=str(mark)) if "{mark" in code else code)
    values = json.loads((other / "config.json").read_text())
    values |= {
        "model_type": "other_remote_for_tests",
        "auto_map": {
            "AutoConfig": "configuration_other.OtherConfig",
            "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
        },
    }
    (other / "config.json").write_text(json.dumps(values))
    model = LFQExpandedModel.from_base(other, output_dim=BITS, trust_remote_code=True).eval()
    assert mark.read_text().startswith("ran")
    model.freeze_base()
    model.save_pretrained(tmp_path / "rows")
    mark.unlink()
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="base_trust_remote_code=True"):
            LFQExpandedModel.from_pretrained(tmp_path / "rows", **options)
        assert not mark.exists()
    again = LFQExpandedModel.from_pretrained(tmp_path / "rows", base_trust_remote_code=True)
    assert torch.equal(logits(again, {"input_ids": IDS}), logits(model, {"input_ids": IDS}))


def test_references_stay_inside_the_folder_and_never_go_round(tmp_path):
    language_model("llama").save_pretrained(tmp_path / "saved" / "base")
    language_model("llama").save_pretrained(tmp_path / "outside")
    model = expanded(tmp_path / "saved" / "base")
    model.save_pretrained(tmp_path / "saved", include_base=False)
    config = tmp_path / "saved" / "config.json"
    values = json.loads(config.read_text())

    def load_with(**changes):
        config.write_text(json.dumps(values | changes))
        return LFQExpandedModel.from_pretrained(tmp_path / "saved")

    for path in ("./../outside", "../outside", "./base/../../outside", ".\\..\\outside"):
        with pytest.raises(ValueError, match="lies outside its folder"):
            load_with(base_model_name_or_path=path)
    for path in (str(tmp_path / "saved"), ".", "./"):
        with pytest.raises(ValueError, match="names itself"):
            load_with(base_model_name_or_path=path)
    shutil.copytree(tmp_path / "saved", tmp_path / "twin")
    with pytest.raises(ValueError, match=r"is a 'llama', but .* is a 'tokcom_lfq_expanded'"):
        load_with(base_model_name_or_path=str(tmp_path / "twin"))
    for name in ("AutoModelForSequenceClassification", "pipeline", "set_seed", "AutoTokenizer"):
        with pytest.raises(ValueError, match="base_auto_class must be one of"):
            load_with(base_auto_class=name)
    with pytest.raises(ValueError, match="not another LFQExpandedModel"):
        LFQExpandedConfig(base_config={"model_type": "tokcom_lfq_expanded"})
    assert load_with().lfq_token_range == (OLD, OLD + 2**BITS)


def test_the_revision_of_a_hub_base_is_kept(tmp_path):
    base = language_model("llama")
    base.config._commit_hash, base.config._name_or_path = "0123abc", "someone/model"
    config = LFQExpandedModel.from_base(base, output_dim=BITS).config
    assert (config.base_model_name_or_path, config.base_revision) == ("someone/model", "0123abc")
    config.save_pretrained(tmp_path)
    assert LFQExpandedConfig.from_pretrained(tmp_path).base_revision == "0123abc"


def test_relative_folders_are_made_absolute(tmp_path, monkeypatch):
    language_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert expanded(Path("base")).config.base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize("include_base", [False, True])
def test_generation_settings_come_back_and_act(tmp_path, base, include_base):
    folder, inputs = base
    model, length = expanded(folder), inputs["input_ids"].shape[1]
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path, include_base=include_base)
    for again in (model, LFQExpandedModel.from_pretrained(tmp_path)):
        assert again.generate(**inputs).shape[1] == length + 3
    given = GenerationConfig(max_new_tokens=2, do_sample=False)
    again = LFQExpandedModel.from_pretrained(tmp_path, generation_config=given)
    assert again.generate(**inputs).shape[1] == length + 2


def test_a_state_dict_in_place_of_a_folder(tmp_path, base):
    folder, inputs = base
    expanded(folder).save_pretrained(tmp_path)
    model = LFQExpandedModel.from_pretrained(tmp_path)
    rows = {name: value for name, value in model.state_dict().items() if name.startswith("lfq_rows.")}
    for weights in (rows, model.state_dict()):
        again = LFQExpandedModel.from_pretrained(None, config=model.config, state_dict=weights)
        assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_older_names_and_misspelt_ones_of_loading_and_saving(tmp_path, base):
    folder, _ = base
    model = expanded(folder)
    with pytest.raises(TypeError, match="'include_bse'"):
        model.save_pretrained(tmp_path, include_bse=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path, safe_serialization=True)
    half = [LFQExpandedModel.from_pretrained(tmp_path, **{name: torch.bfloat16}) for name in ("dtype", "torch_dtype")]
    assert [{p.dtype for p in model.parameters()} for model in half] == [{torch.bfloat16}] * 2
    assert (
        LFQExpandedModel.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    )


def test_saved_over_its_base_a_model_keeps_it(tmp_path, base):
    folder, inputs = base
    shutil.copytree(folder, tmp_path / "base")
    model = LFQExpandedModel.from_base(tmp_path / "base", output_dim=BITS)
    model.freeze_base()
    with pytest.raises(ValueError, match="is the folder of the base model"):
        model.save_pretrained(tmp_path / "base", include_base=False)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "base")
    again = LFQExpandedModel.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again, inputs), expected)
    again.save_pretrained(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(logits(LFQExpandedModel.from_pretrained(tmp_path / "elsewhere"), inputs), expected)


@pytest.mark.parametrize("include_base", [False, True])
def test_cut_files_and_other_shapes_are_named(tmp_path, base, include_base):
    folder, _ = base
    expanded(folder).save_pretrained(tmp_path, include_base=include_base)
    with pytest.raises(ValueError, match=r"shape|do not fit"):
        LFQExpandedModel.from_pretrained(tmp_path, output_dim=BITS + 1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"model.safetensors is damaged or was cut short"):
        LFQExpandedModel.from_pretrained(tmp_path)
