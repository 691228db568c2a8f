"""`LFQExpandedModel`: exact old logits, frozen old rows, the loss, generation, and what it refuses."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedConfig, PreTrainedModel

from tests.helpers.lfq_tools import LANGUAGE, OLD, VISION_LANGUAGE, language_model, vision_batch, vision_language_model
from tokcom_hf import LFQExpandedModel
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.models.lfq_rows import vocabulary_of

BITS = 6
END = OLD + 2**BITS
# Their logits are not what the head returns: capped or scaled.
CHANGED_LOGITS = ("gemma2", "cohere")


def mixed_ids(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, OLD - 5, (2, 5), generator=generator)
    return torch.cat([text, torch.randint(OLD, END, (2, 6), generator=generator)], dim=1)


@pytest.mark.parametrize("name", LANGUAGE)
def test_old_logits_are_bitwise_those_of_the_base(name):
    base, ids = language_model(name), mixed_ids()[:, :5]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        got = LFQExpandedModel.from_base(base, output_dim=BITS)(input_ids=ids).logits
    assert torch.equal(got[..., :OLD], expected) and got.shape[-1] == END


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_vision_language_models_see_their_images_as_before(family):
    base, inputs = vision_language_model(family), vision_batch(family)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = LFQExpandedModel.from_base(base, output_dim=BITS)
        assert torch.equal(model(**inputs).logits[..., :OLD], expected)
        changed = inputs | {"pixel_values": inputs["pixel_values"] + 1}
        assert not torch.equal(model(**changed).logits[..., :OLD], expected)
    # An image in, LFQ ids out, with the cache of the base model.
    ids = model.generate(**inputs, mode="image", num_image_tokens=5, do_sample=False)[:, -5:]
    assert ids.min() >= OLD and ids.max() < END
    labels = inputs["input_ids"].clone()
    labels[:, -4:] = torch.randint(OLD, END, (2, 4))
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.lfq_rows.tables()[0].grad.abs().sum() > 0


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_loss_equals_the_dense_one_in_value_and_gradients(name):
    model, ids = LFQExpandedModel.from_base(language_model(name), output_dim=BITS), mixed_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    for kwargs, divisor in (({}, None), ({"num_items_in_batch": 40}, 40)):
        model.zero_grad()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        dense = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum" if divisor else "mean")
        dense = dense / divisor if divisor else dense
        expected = torch.autograd.grad(dense, [p for p in model.parameters() if p.requires_grad])
        output = model(input_ids=ids, labels=labels, **kwargs)
        assert output.logits is None
        assert model.plain_head is (name not in CHANGED_LOGITS)
        torch.testing.assert_close(output.loss, dense, atol=1e-5, rtol=1e-5)
        got = torch.autograd.grad(output.loss, [p for p in model.parameters() if p.requires_grad])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    both = model(input_ids=ids, labels=labels, return_logits=True)
    torch.testing.assert_close(both.loss, output.loss * 40 / (labels[:, 1:] != -100).sum(), atol=1e-5, rtol=1e-5)
    assert both.logits.shape == (2, 11, END)


def test_the_loss_never_holds_all_logits(monkeypatch):
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS).train()
    widest = []
    catching = torch.cat

    def spy(tensors, *args, **kwargs):
        joined = catching(tensors, *args, **kwargs)
        if joined.shape[-1] == END:
            widest.append(joined.numel() // END)
        return joined

    monkeypatch.setattr(torch, "cat", spy)
    ids = mixed_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    # One position per row, to see whether the base model changes its logits.
    assert widest and max(widest) <= len(ids)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_models_stay_tied_and_untied_ones_untied(tied):
    model = LFQExpandedModel.from_base(language_model("llama_tied" if tied else "llama"), output_dim=BITS)
    assert (model.lfq_rows.head is None) == tied
    embedding, head = vocabulary_of(model.base)
    assert (embedding.weight is head.weight) == tied
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lfq_rows" in name}
    assert trainable == {"lfq_rows.embedding"} | (set() if tied else {"lfq_rows.head"})
    ids = mixed_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert embedding.weight.grad is None and head.weight.grad is None
    merged = model.merge_and_unload()
    embedding, head = vocabulary_of(merged)
    assert (embedding.weight is head.weight) == tied


def test_what_trains_and_what_share():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    assert model.trainable_rows() == {"trainable": 64, "total": 164, "share": 64 / 164}
    model.freeze_base()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"lfq_rows.embedding", "lfq_rows.head"}
    model.freeze_base(False)
    assert not model.base.model.embed_tokens.weight.requires_grad and model.base.model.norm.weight.requires_grad
    model.freeze_original_rows(False)
    assert model.trainable_rows()["share"] == 1.0 and model.config.freeze_original is False
    # Also with old rows that train, the loss has their gradients.
    ids = mixed_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.base.lm_head.weight.grad.abs().sum() > 0


def test_embeddings_as_seen_from_outside():
    model = LFQExpandedModel.from_base(language_model("phi"), output_dim=BITS)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight.shape == (END, 32) and head.bias.shape == (END,) and table.num_embeddings == END
    ids = mixed_ids()
    torch.testing.assert_close(table(ids), F.embedding(ids, table.weight))
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.weight, head.bias), atol=1e-5, rtol=1e-5)
    assert not any("SplitTable" in type(m).__name__ for m in model.modules())
    with pytest.raises(ValueError, match="cannot be replaced or resized"):
        model.resize_token_embeddings(500)


def test_modes_of_generation():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    with torch.no_grad():
        model.lfq_rows.head.normal_(0, 0.3)
    prompt = mixed_ids()[:, :5]
    new = lambda **options: model.generate(prompt, **options)[:, 5:]  # noqa: E731
    text = new(mode="text", max_new_tokens=20, do_sample=True)
    assert text.shape == (2, 20) and text.max() < OLD
    image = new(mode="image", num_image_tokens=12, do_sample=True, top_k=None)
    assert image.shape == (2, 12) and image.min() >= OLD and image.max() < END
    torch.manual_seed(0)
    mixed = new(mode="mixed", num_image_tokens=4, max_new_tokens=60, do_sample=True, top_k=None)
    for row in (mixed >= OLD).int().tolist():
        runs = "".join(map(str, row)).split("0")
        # Every run of LFQ ids is one whole image; only the last may be cut by the end.
        assert {len(run) for run in runs[:-1]} <= {0, 4} and "1111" in runs
    beams = new(mode="image", num_image_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape == (4, 3) and beams.min() >= OLD
    with pytest.raises(ValueError, match="text, image, mixed"):
        new(mode="picture")
    with pytest.raises(ValueError, match="num_image_tokens must be >= 1"):
        new(mode="image", num_image_tokens=0)


def test_padding_rows_of_the_table_are_never_generated():
    tokenizer = train_tokenizer(["the quick brown fox"] * 4, 270)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    model = LFQExpandedModel.from_base(base.eval(), output_dim=3, tokenizer=tokenizer)
    assert model.config.text_vocab_size == len(tokenizer) and model.lfq_token_range == (320, 328)
    for mode in ("text", "mixed"):
        ids = model.generate(torch.tensor([[5, 6]]), mode=mode, num_image_tokens=2, max_new_tokens=100, do_sample=True)
        assert not ((ids >= len(tokenizer)) & (ids < 320)).any()


def test_cached_generation_equals_the_forward_without_cache():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    ids = model.generate(mixed_ids(), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits[:, 10:-1].argmax(-1)
    assert torch.equal(ids[:, 11:], again)


def test_left_padding_does_not_change_the_image():
    model, ids = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS), mixed_ids()[:1, :5]
    alone = model.generate(ids, mode="image", num_image_tokens=6, do_sample=False)[0, -6:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    got = model.generate(padded, attention_mask=mask, mode="image", num_image_tokens=6, do_sample=False)[0, -6:]
    assert torch.equal(alone, got)


def test_guidance_follows_its_formula():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    prompt, empty = mixed_ids()[:1, :5], mixed_ids()[:1, 4:5]
    options = {"mode": "image", "num_image_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    guided = model.generate(prompt, guidance_scale=3.0, negative_prompt_ids=empty, output_scores=True, **options)
    with torch.no_grad():
        with_caption, without = (model(input_ids=x).logits[:, -1].log_softmax(-1) for x in (prompt, empty))
    expected = without + 3.0 * (with_caption - without)
    torch.testing.assert_close(guided.scores[0][:, OLD:], expected[:, OLD:], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_and_input_gradients():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS).train()
    ids = mixed_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = model.lfq_rows.embedding.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(model.lfq_rows.embedding.grad, expected)


def test_bfloat16_model_and_autocast():
    ids = mixed_ids()
    model = LFQExpandedModel.from_base(language_model("llama").bfloat16(), output_dim=BITS)
    # Over a bfloat16 base the rows train in float32.
    assert {p.dtype for p in model.lfq_rows.parameters()} == {torch.float32}
    assert model(input_ids=ids).logits.dtype == torch.bfloat16
    full = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    with torch.no_grad():
        full.lfq_rows.embedding.copy_(model.lfq_rows.embedding)
        full.lfq_rows.head.copy_(model.lfq_rows.head)
    expected = full(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = full(input_ids=ids, labels=ids).loss
    for loss in (model(input_ids=ids, labels=ids).loss, cast):
        torch.testing.assert_close(loss.float(), expected, atol=0.05, rtol=0.02)
        loss.backward()
    assert model.lfq_rows.head.grad.dtype == torch.float32 and full.lfq_rows.head.grad.dtype == torch.float32


class ForeignConfig(PreTrainedConfig):
    """A VLM as remote code writes it: the language model's configuration is `llm_config`."""

    model_type = "foreign_vlm_for_tests"

    def __init__(self, llm_config=None, **kwargs):
        self.llm_config = LlamaConfig(**(llm_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.llm_config


class ForeignVLM(PreTrainedModel):
    """Adds its picture to every embedding and hands over to `language_model`."""

    config_class = ForeignConfig

    def __init__(self, config):
        super().__init__(config)
        self.language_model = language_model("llama")
        self.picture = torch.nn.Linear(4, 32)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(self, input_ids, pixel_values=None, attention_mask=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embedded = embedded + self.picture(pixel_values)[:, None]
        return self.language_model(inputs_embeds=embedded, attention_mask=attention_mask, **kwargs)


def test_remote_code_with_a_language_model_and_an_llm_config():
    base = ForeignVLM(ForeignConfig(llm_config=language_model("llama").config.to_dict())).eval()
    ids, pixels = mixed_ids(), torch.randn(2, 4)
    with torch.no_grad():
        expected = base(ids[:, :5], pixels).logits
        model = LFQExpandedModel.from_base(base, output_dim=BITS)
        assert torch.equal(model(input_ids=ids[:, :5], pixel_values=pixels).logits[..., :OLD], expected)
    output = model(input_ids=ids, pixel_values=pixels, labels=ids)
    output.loss.backward()
    assert model.lfq_rows.head.grad.abs().sum() > 0
    image = model.generate(ids, pixel_values=pixels, mode="image", num_image_tokens=4, do_sample=False)[:, -4:]
    assert image.min() >= OLD
    merged = model.merge_and_unload()
    assert type(merged) is ForeignVLM and merged.language_model.lm_head.weight.shape == (END, 32)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi", "gemma3"])
def test_merged_in_memory_gives_the_same_logits_and_forgets_the_wrapper(name):
    model, ids = LFQExpandedModel.from_base(language_model(name), output_dim=BITS), mixed_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not any(hooks for m in merged.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert merged.config.get_text_config().vocab_size == END
    again = copy.deepcopy(merged).generate(ids, max_new_tokens=3, do_sample=False)
    assert again.shape == (2, 14)


def test_bad_input_is_named():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    with pytest.raises(ValueError, match="already has LFQ tokens"):
        LFQExpandedModel.from_base(model, output_dim=BITS)
    with pytest.raises(ValueError, match=r"already has LFQ tokens \(output_dim=6, merged"):
        LFQExpandedModel.from_base(model.merge_and_unload(), output_dim=BITS)
    headless = AutoModel.from_config(LANGUAGE["llama"]())
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        LFQExpandedModel.from_base(headless)
    large = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 4, 280)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(len\(tokenizer\)\)"):
        LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS, tokenizer=large)
    with pytest.raises(ValueError, match="random, zeros, mean"):
        LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS, embedding_init_method="ones")
    with pytest.raises(TypeError, match="together with the name"):
        LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS, dtype=torch.bfloat16)
    with pytest.raises(OSError):
        LFQExpandedModel.from_base("/no/such/model")


def test_an_id_beyond_the_vocabulary_raises():
    model = LFQExpandedModel.from_base(language_model("llama"), output_dim=BITS)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[END]]))
