"""Every argument of `LFQExpandedModel` acts or is refused: forward, generate, plain `Trainer`."""

import inspect
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.helpers.lfq_tools import OLD, language_model, vision_batch, vision_language_model
from tokcom_hf import LFQExpandedModel
from tokcom_hf.models.shared_cache_name import CACHE

BITS = 6
END = OLD + 2**BITS
IDS = torch.tensor([[5, 6, 7, OLD + 3, OLD + 40], [8, 9, 10, OLD + 1, OLD + 63]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS).eval()


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    return LFQExpandedModel.from_base(vision_language_model("llava"), output_dim=BITS).eval()


@pytest.mark.parametrize("labels", [None, IDS])
def test_a_misspelt_keyword_is_named(model, vlm, labels):
    with pytest.raises(TypeError, match="atention_mask"):
        model(input_ids=IDS, labels=labels, atention_mask=torch.ones_like(IDS))
    # A column that this base model does not read is no help to it either.
    for name in ("pixel_values", "token_type_ids", "shift_labels"):
        with pytest.raises(TypeError, match=name):
            model(input_ids=IDS, labels=labels, **{name: torch.ones_like(IDS)})
    inputs = vision_batch("llava")
    with pytest.raises(TypeError, match="pixel_valeus"):
        vlm(**inputs, pixel_valeus=inputs["pixel_values"])
    assert vlm(**inputs, vision_feature_layer=-1).logits.shape[-1] == END
    # LLaVA hands it to its decoder, whose argument it is.
    for wanted in (True, False):
        assert (getattr(vlm(**inputs, use_cache=wanted), CACHE) is not None) is wanted
    with pytest.raises(ValueError, match="temprature"):
        model.generate(IDS, temprature=0.5, max_new_tokens=2)
    with pytest.raises(ValueError, match="leave max_new_tokens out"):
        model.generate(IDS, mode="image", num_image_tokens=4, max_new_tokens=9)
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(IDS, input_ids=IDS)


def test_a_tuple_where_it_is_asked_for(model):
    with torch.no_grad():
        output = model(input_ids=IDS, labels=IDS, return_logits=True, output_hidden_states=True, use_cache=True)
        answer = model(
            input_ids=IDS, labels=IDS, return_logits=True, output_hidden_states=True, use_cache=True, return_dict=False
        )
        assert isinstance(answer, tuple) and torch.equal(answer[0], output.loss)
        assert torch.equal(answer[1], output.logits) and len(answer) == 4
        plain = model(input_ids=IDS, return_dict=False, use_cache=False)
        assert len(plain) == 1 and torch.equal(plain[0], output.logits)
        assert len(model(input_ids=IDS, labels=IDS, return_dict=False)) == 1


def test_hidden_states_and_attentions_are_given(model, tmp_path):
    with torch.no_grad():
        plain = model(input_ids=IDS)
        for labels in (None, IDS):
            output = model(input_ids=IDS, labels=labels, output_hidden_states=True)
            assert len(output.hidden_states) == 3 and output.hidden_states[-1].shape == (2, 5, 32)
            torch.testing.assert_close(model.joined_head(output.hidden_states[-1]), plain.logits)
    model.save_pretrained(tmp_path)
    eager = LFQExpandedModel.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        for labels in (None, IDS):
            attentions = eager(input_ids=IDS, labels=labels, output_attentions=True).attentions
            assert len(attentions) == 2 and attentions[0].shape == (2, 4, 5, 5)
        torch.testing.assert_close(eager(input_ids=IDS).logits, plain.logits, atol=1e-5, rtol=1e-5)
        eager.config.output_hidden_states = True
        assert len(eager(input_ids=IDS).hidden_states) == 3
        # Where an implementation computes none, it is said.
        try:
            attentions = model(input_ids=IDS, output_attentions=True).attentions
        except ValueError as error:
            assert "eager" in str(error)
        else:
            assert len(attentions) == 2 and attentions[0].shape == (2, 4, 5, 5)


def test_a_loss_brings_no_logits_and_no_cache_along(model):
    output = model(input_ids=IDS, labels=IDS)
    assert set(output.keys()) == {"loss"} and output.logits is None
    with pytest.raises(ValueError, match="needs return_logits=True"):
        model(input_ids=IDS, labels=IDS, logits_to_keep=1)
    with torch.no_grad():
        full = model(input_ids=IDS).logits
        for keep, places in ((2, slice(-2, None)), (0, slice(None)), (torch.tensor([1, 3]), [1, 3])):
            some = model(input_ids=IDS, labels=IDS, return_logits=True, logits_to_keep=keep)
            torch.testing.assert_close(some.logits, full[:, places])
            torch.testing.assert_close(some.loss, output.loss)
            torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=keep).logits, full[:, places])
    with pytest.raises(ValueError, match="leaves nothing to compute"):
        model(input_ids=IDS, return_logits=False)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_under_both_names_and_without_a_warning(model, name):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        full = model(input_ids=IDS).logits
        first = model(input_ids=IDS[:, :3], use_cache=True)
        kept = first["cache"] if "cache" in first.keys() else first["past_key_values"]  # noqa: SIM118
        rest = model(input_ids=IDS[:, 3:], **{name: kept}).logits
        model.generate(IDS, max_new_tokens=2, num_beams=2, do_sample=False)
    torch.testing.assert_close(rest, full[:, 3:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=IDS, cache=kept, past_key_values=kept)


def test_beams_equal_a_search_over_the_merged_model():
    torch.manual_seed(0)
    model = LFQExpandedModel.from_base(language_model("llama_tied"), output_dim=BITS, embedding_init_std=0.2).eval()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(IDS, **options)
    assert torch.equal(model.merge_and_unload().generate(IDS, **options), found)


class Rows(torch.utils.data.Dataset):
    """Rows as a processor gives them, with a column that no model reads."""

    def __init__(self, inputs):
        self.inputs = inputs | {"labels": inputs["input_ids"]}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[index % 2] for name, value in self.inputs.items()} | {"note": "text"}


@pytest.mark.parametrize("family", ["llama", "llava", "internvl"])
def test_plain_trainer_with_its_defaults(tmp_path, family):
    torch.manual_seed(0)
    base = language_model("llama") if family == "llama" else vision_language_model(family)
    inputs = {"input_ids": IDS.clone()} if family == "llama" else vision_batch(family)
    inputs["input_ids"][:, -2:] = torch.tensor([[OLD + 3, OLD + 40], [OLD + 1, OLD + 63]])
    model = LFQExpandedModel.from_base(base, output_dim=BITS)
    model.freeze_base()
    seen = []
    forward = type(base).forward

    def spy(self, *args, **kwargs):
        seen.append(set(kwargs))
        return forward(self, *args, **kwargs)

    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True)
    trainer = Trainer(model, args, train_dataset=Rows(inputs), eval_dataset=Rows(inputs))
    before = model.lfq_rows.embedding.detach().clone()
    old = model.base.get_input_embeddings().weight.detach().clone()
    base.forward = spy.__get__(base)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    del base.forward
    assert seen and all({"pixel_values"} & set(inputs) <= names and "note" not in names for names in seen)
    assert not torch.equal(model.lfq_rows.embedding, before) and loss > 0
    assert torch.equal(model.base.get_input_embeddings().weight, old)
    again = LFQExpandedModel.from_pretrained(sorted(tmp_path.glob("checkpoint-*"))[-1])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_the_columns_of_the_families_are_named():
    named = set(inspect.signature(LFQExpandedModel.forward).parameters)
    for column in ("pixel_values", "image_sizes", "image_grid_thw", "token_type_ids", "mm_token_type_ids", "labels"):
        assert column in named


def test_gradient_checkpointing_gives_the_same_gradients(vlm):
    inputs = vision_batch("llava")
    inputs["input_ids"][:, -2:] = OLD + 3
    gradients = []
    for enable in (vlm.gradient_checkpointing_disable, vlm.gradient_checkpointing_enable):
        enable()
        vlm.zero_grad()
        vlm.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None})
    vlm.gradient_checkpointing_disable()
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


def test_prompts_that_are_none_are_named(model):
    for call in (lambda ids: model(input_ids=ids), lambda ids: model.generate(ids, max_new_tokens=1)):
        for ids in ([[5, 6]], torch.rand(1, 3)):
            with pytest.raises(TypeError, match="must be a tensor of token ids"):
                call(ids)
        for ids in (torch.tensor([5, 6]), IDS[:0], IDS[:, :0]):
            with pytest.raises(ValueError, match="both at least 1"):
                call(ids)
    with pytest.raises(TypeError, match="got NoneType"):
        LFQExpandedModel.from_base(None, output_dim=BITS)
    with pytest.raises(TypeError, match="must be a GenerationConfig, got dict"):
        model.generate(IDS, generation_config={"max_new_tokens": 1})
