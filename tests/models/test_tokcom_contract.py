"""What transformers' users expect of TokComVAE, DenoisedModel, TokComModel, VQGAN and its discriminator.

"tokcom" is the documented TokComModel, "context" one that reads finished chunks as tokens.
"""

import inspect
import tempfile

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel, Trainer, TrainingArguments

from tests.helpers.tokcom_tools import CONTEXT, MODELS, SHAPE, VAE, inputs, main_output, seeded, small
from tokcom_hf import VQGAN, TokComConfig, TokComModel, TokComVAE, VQGANConfig

WITH_LAYERS = ("vae", "denoiser")
WHOLE = ("tokcom", "context", "posterior")


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request, tmp_path_factory):
    """A kind of model, its folder, its inputs and its output."""
    folder = tmp_path_factory.mktemp(request.param)
    model, batch = small(request.param), inputs(request.param)
    model.save_pretrained(folder)
    return request.param, folder, batch, main_output(model(**batch)).detach()


def same(kind: str, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether outputs are equal; weights read from a file begin at odd addresses, where Llama's sums round differently."""
    return torch.allclose(ours, theirs, atol=1e-5, rtol=0) if kind == "context" else torch.equal(ours, theirs)


# ---------------------------------------------------------------- arguments of forward
def test_forward_names_its_arguments_and_refuses_others(saved):
    kind, _, batch, _ = saved
    model = small(kind)
    parameters = inspect.signature(model.forward).parameters.values()
    assert not [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    for name in ("output_hidden_stats", "atention_mask", "num_items_in_batch"):
        with pytest.raises(TypeError, match=name):
            model(**batch, **{name: None})


def test_a_tuple_where_asked_for_by_argument_or_config(saved):
    kind, folder, batch, expected = saved
    model = small(kind)
    whole = model(**batch)
    parts = model(**batch, return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == len(whole)
    assert all(torch.equal(part, whole[i]) for i, part in enumerate(parts))
    configured = AutoModel.from_pretrained(folder, return_dict=False)
    assert isinstance(configured(**batch), tuple)
    assert same(kind, main_output(configured(**batch, return_dict=True)), expected)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_config_of_tuples_changes_no_method(kind):
    models = [small(kind, return_dict=flag, eos_token_id=None) for flag in (True, False)]
    models[1].vae.config.return_dict = models[1].denoiser.config.return_dict = False
    if kind == "context":
        models[1].context.model.config.return_dict = False
    ids = [m.generate(num_chunks=3, num_steps=2, generator=seeded()) for m in models]
    assert torch.equal(*ids)
    assert torch.equal(*[m(**inputs(kind), return_dict=True).loss for m in models])


@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_hidden_states_and_attentions_of_every_layer(kind, tmp_path):
    small(kind).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    batch = inputs(kind)
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    plain = model(**batch)
    assert torch.equal(main_output(output), main_output(plain)) and "hidden_states" not in plain
    length, stacks = (4, 2) if kind == "vae" else (5, 1)
    states, weights = output.hidden_states, output.attentions
    assert len(states) == 3 * stacks and len(weights) == 2 * stacks
    assert {tuple(state.shape) for state in states} == {(len(states[0]), length, 32)}
    assert {tuple(each.shape) for each in weights} == {(len(states[0]), 4, length, length)}
    torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0][..., 0]))
    assert not torch.allclose(states[0], states[1]) and not torch.allclose(states[1], states[2])
    if kind == "vae":
        assert torch.equal(model.lm_head(states[-1]), output.logits)
        assert torch.equal(states[0], model.embed_tokens(batch["input_ids"].view(-1, 4)))
        assert torch.equal(model.latent_proj(states[2][:, -1]), output.latents)
    else:
        assert torch.equal(model.output_proj(states[-1]), output.clean_latents)


@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_attention_weights_that_are_not_computed_are_refused(kind):
    model = small(kind)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa' does not compute"):
        model(**inputs(kind), output_attentions=True)


@pytest.mark.parametrize("kind", WHOLE)
def test_the_parts_of_a_whole_model_give_their_layers(kind, tmp_path):
    small(kind).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(TypeError, match=name):
            model(**inputs(kind), **{name: True})
    seen = {"output_hidden_states": True, "output_attentions": True}
    context = {} if kind == "tokcom" else {"context": torch.randn(2, 48)}
    latents = {"latents": torch.randn(2, 5, model.config.denoiser.latent_size)}
    outputs = [model.vae(**inputs("vae"), **seen), model.denoiser(**inputs("denoiser") | latents, **context, **seen)]
    if kind != "tokcom":
        outputs.append(model.context.model(**inputs("vae"), **seen))
    for output in outputs:
        assert len(output.hidden_states) >= 3 and len(output.attentions) >= 2
    # A config that asks for them changes nothing of the whole.
    plain = model(**inputs(kind)).loss
    for part in (model.vae, model.denoiser, *([] if kind == "tokcom" else [model.context.model])):
        part.config.output_hidden_states = part.config.output_attentions = True
    assert torch.equal(model(**inputs(kind)).loss, plain)


@pytest.mark.parametrize("kind", ["vqgan", "discriminator"])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_layer_outputs_of_convolutions_are_refused_in_words(kind, name):
    with pytest.raises(ValueError, match=f"{name}=True: .* no outputs of its layers"):
        small(kind)(**inputs(kind), **{name: True})


def test_hidden_states_asked_for_by_the_config(tmp_path):
    small("denoiser").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, output_hidden_states=True)
    assert len(model(**inputs("denoiser")).hidden_states) == 3
    assert model(**inputs("denoiser"), output_hidden_states=False).hidden_states is None


# ---------------------------------------------------------------- numbers, devices, memory
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_float32_inputs(saved, dtype):
    _, folder, batch, expected = saved
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    output = main_output(model(**batch))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["vae", "denoiser", "tokcom", "context", "posterior", "vqgan"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        model = small(kind, **({"temperature": 0.0} if kind == "vqgan" else {})).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        output = model(**inputs(kind))
        (output.loss if kind in WHOLE else main_output(output).square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert kind != "context" or any(name.startswith("context.model.layers") for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_cast_model_is_the_one_that_is_loaded_in_that_type(dtype, tmp_path):
    model = small("context").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    ids = torch.randint(0, 50, (2, 64), generator=seeded())
    # Rotary positions in half precision would be wrong by far more than the sums of half precision.
    torch.testing.assert_close(model.context(ids), loaded.context(ids), atol=2e-2, rtol=2e-2)


def test_vqgan_attention_implementations_agree(monkeypatch, tmp_path):
    small("vqgan").save_pretrained(tmp_path)
    batch = inputs("vqgan")
    sdpa, eager = (VQGAN.from_pretrained(tmp_path, attn_implementation=name) for name in ("sdpa", "eager"))
    expected = sdpa(**batch).reconstruction
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    torch.testing.assert_close(eager(**batch).reconstruction, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError):
        sdpa(**batch)


# With accelerate 1.10 something must be left on the CPU.
@pytest.mark.parametrize("share", [0.8, 0.95])
def test_offloaded_models_are_exact(saved, share, tmp_path):
    kind, folder, batch, expected = saved
    size = sum(p.numel() * p.element_size() for p in small(kind).parameters())
    model = AutoModel.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    output = model(**batch)
    assert same(kind, main_output(output), expected)
    if kind in WHOLE:
        whole = small(kind)(**batch)
        for name in (
            "loss",
            "cross_entropy_loss",
            *(["next_token_loss", "later_token_loss"] if kind == "context" else []),
        ):
            torch.testing.assert_close(output[name], whole[name], atol=1e-5, rtol=1e-5)
    if kind == "vae":
        ids = batch["input_ids"]
        whole = small(kind)
        assert torch.equal(model.decode(model.encode(ids)), whole.decode(whole.encode(ids)))
        torch.testing.assert_close(model(ids, labels=ids).loss, whole(ids, labels=ids).loss)
    if kind == "vqgan":
        codes = model.encode(**batch)
        assert torch.equal(codes, small(kind).encode(**batch))
        assert torch.equal(model.decode_codes(codes), small(kind).decode_codes(codes))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_offloaded_generation_is_exact(kind, share, tmp_path):
    whole = small(kind, eos_token_id=None, standardize_latents=True)
    whole.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    model = AutoModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    for prompt in (None, torch.arange(1, 8)[None]):
        ids = [m.generate(prompt, num_steps=2, generator=seeded(), max_new_tokens=9) for m in (whole, model)]
        assert torch.equal(*ids)
    assert torch.equal(whole.reconstruct(torch.arange(8)[None]), model.reconstruct(torch.arange(8)[None]))


def test_tied_weights_in_different_places_are_refused_in_words(tmp_path):
    small("vae").save_pretrained(tmp_path)
    places = dict.fromkeys(["embed_tokens", "encoder", "decoder", "latent_proj", "decoder_proj"], "cpu")
    with pytest.raises(ValueError, match="one tied tensor, to different places"):
        AutoModel.from_pretrained(tmp_path, device_map=places | {"lm_head": "disk"}, offload_folder=tmp_path / "off")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_codebook_loaded_for_half_precision_keeps_its_types(dtype, tmp_path):
    model = small("vqgan")
    model.save_pretrained(tmp_path / "one")
    half = VQGAN.from_pretrained(tmp_path / "one", dtype=dtype)
    kinds = {name: value.dtype for name, value in half.quantizer.named_buffers()}
    assert kinds == {name: value.dtype for name, value in model.quantizer.named_buffers()}
    half.save_pretrained(tmp_path / "two")
    assert torch.equal(VQGAN.from_pretrained(tmp_path / "two").quantizer.codebook, model.quantizer.codebook)


# ---------------------------------------------------------------- names of configs, vocabulary
def test_configs_answer_to_the_usual_names():
    config = TokComConfig(vae=VAE | {"hidden_size": 64}, denoiser=SHAPE)
    assert config.vocab_size == 51 and config.hidden_size == 32 and config.num_hidden_layers == 2
    assert config.num_attention_heads == 4 and config.num_key_value_heads == 2 and config.intermediate_size == 48
    assert "vocab_size" not in config.to_diff_dict()
    read = TokComConfig(vae=VAE, denoiser=SHAPE, context=CONTEXT).context
    assert (read.vocab_size, read.hidden_size, read.pad_token_id) == (51, 48, None)
    with pytest.raises(AttributeError):
        TokComConfig(vae=VAE, denoiser=SHAPE, vocab_size=99)
    vqgan = VQGANConfig(vocab_size=32, num_channels=1, hidden_size=16)
    assert (vqgan.codebook_size, vqgan.in_channels, vqgan.latent_channels) == (32, 1, 16)
    assert (vqgan.vocab_size, vqgan.num_channels, vqgan.hidden_size) == (32, 1, 16)
    with pytest.raises(ValueError, match="codebook_size must be at least 2"):
        VQGANConfig(vocab_size=1)


@pytest.mark.parametrize("kind", ["vae", *WHOLE])
@pytest.mark.parametrize(("rows", "multiple"), [(60, None), (40, None), (None, 32), (51, None), (60, 64)])
def test_resized_embeddings_keep_tokens_and_the_omni_token(kind, rows, multiple, tmp_path):
    model = small(kind)
    vae = model if kind == "vae" else model.vae
    before, latents = vae.embed_tokens.weight.detach().clone(), vae.encode(torch.arange(8)[None])
    logits = vae(torch.arange(8)[None]).logits
    read = None if kind != "context" else model.context(torch.arange(8)[None])
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    size = rows if multiple is None else 64
    kept = min(50, size - 1)
    assert vae.config.vocab_size == size and vae.config.omni_token_id == size - 1
    assert model.config.vocab_size == size and model.get_input_embeddings().num_embeddings == size
    assert vae.lm_head.weight is vae.embed_tokens.weight and vae.lm_head.out_features == size
    assert torch.equal(vae.embed_tokens.weight[:kept], before[:kept])
    assert torch.equal(vae.embed_tokens.weight[-1], before[50])
    assert size < 51 or torch.equal(vae.embed_tokens.weight[50], before[50])
    assert torch.equal(vae.encode(torch.arange(8)[None]), latents)
    torch.testing.assert_close(vae(torch.arange(8)[None]).logits[..., :kept], logits[..., :kept])
    if kind == "context":
        assert model.context.model.embed_tokens.num_embeddings == model.config.context.vocab_size == size
        assert torch.equal(model.context(torch.arange(8)[None]), read)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.vocab_size == size
    if kind == "context":
        assert torch.equal(again.context(torch.arange(8)[None]), read)
        assert torch.equal(again.context.head_logits(read), model.context.head_logits(read))
        assert again.generate(num_chunks=2, num_steps=1).max() < size
    assert torch.equal(again.get_output_embeddings().weight, vae.lm_head.weight)


def test_a_resize_that_cannot_work_changes_nothing():
    model = small("context", eos_token_id=45)
    for call in (
        lambda: model.resize_token_embeddings(1),
        lambda: model.resize_token_embeddings(46),
        lambda: small("vae", omni_token_id=30).resize_token_embeddings(30),
    ):
        with pytest.raises(ValueError, match=r"rows|resized"):
            call()
    assert model.config.vocab_size == 51 and model.get_input_embeddings().weight.shape == (51, 32)
    assert model.context.model.embed_tokens.weight.shape == (51, 48) and model.context.start_token_id == 50
    offloaded = small("context")
    cpu_offload(offloaded.context, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded weights cannot be resized"):
        offloaded.resize_token_embeddings(60)
    assert offloaded.config.vocab_size == 51 and offloaded.get_input_embeddings().weight.shape == (51, 32)
    kept = small("vae", omni_token_id=30)
    kept.resize_token_embeddings(40)
    assert kept.config.omni_token_id == 30


# ---------------------------------------------------------------- adapters and the plain Trainer
PEFT = {
    "vae": [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "norm"]}],
    "denoiser": [{}, {"modules_to_save": ["output_proj", "norm"]}],
    "tokcom": [{}, {"modules_to_save": ["output_proj"]}, {"modules_to_save": ["lm_head"]}],
    "context": [{}, {"modules_to_save": ["heads", "output_proj"]}],
    "vqgan": [{"target_modules": ["conv1"], "modules_to_save": ["quantizer"]}],
    "discriminator": [{"target_modules": ["layers.2"]}],
}


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind, rows in PEFT.items() for options in rows])
def test_adapters_train_save_load_and_merge(kind, options, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = small(kind)
    base.save_pretrained(tmp_path / "base")
    batch = inputs(kind) | ({"labels": inputs(kind)["input_ids"], "return_logits": True} if kind == "vae" else {})
    before = main_output(base(**batch)).detach()
    model = get_peft_model(base, LoraConfig(**{"target_modules": "all-linear"} | options)).train()
    trained = model(**batch)
    (trained.loss if trained.get("loss") is not None else main_output(trained).square().mean()).backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The encoder of the VAE is only read in a whole model, and its adapters with it.
    reached = [p for name, p in model.named_parameters() if p.requires_grad and ".vae." not in name]
    assert all(p.grad is not None for p in (reached if kind in WHOLE else trainable))
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(0.05 * torch.randn_like(parameter))
    changed = main_output(model.eval()(**batch)).detach()
    assert not torch.allclose(changed, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(main_output(again(**batch)), changed, atol=1e-5, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(main_output(merged(**batch)), changed, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(main_output(reloaded(**batch)), main_output(merged(**batch)), atol=1e-5, rtol=1e-5)


def test_the_loss_of_an_adapted_head_is_that_of_its_logits():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small("vae"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    ids, labels = torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 8))
    labels[0, :5] = -100
    output = model(input_ids=ids, labels=labels, return_logits=True)
    expected = torch.nn.functional.cross_entropy(output.logits.view(-1, 51), labels.view(-1))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kept", [None, ["quantizer"]])
def test_an_adapter_moves_the_codebook_only_where_it_saves_it(kept, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, batch = small("vqgan"), inputs("vqgan")
    base.save_pretrained(tmp_path / "base")
    codebook = base.quantizer.codebook.clone()
    model = get_peft_model(base, LoraConfig(target_modules=["conv1"], modules_to_save=kept)).train()
    model(**batch).loss.backward()
    now = dict(model.base_model.model.quantizer.named_buffers())
    moved = [
        not torch.equal(value, codebook) for name, value in now.items() if name == "modules_to_save.default.codebook"
    ]
    assert moved == ([] if kept is None else [True])
    if kept is None:
        assert torch.equal(base.quantizer.codebook, codebook)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected, found = model.eval()(**batch), again.eval()(**batch)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, atol=1e-5, rtol=1e-5)


def test_an_adapter_needs_a_codebook_that_was_placed():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small("vqgan", codebook_init="data"), LoraConfig(target_modules=["conv1"]))
    with pytest.raises(ValueError, match="'quantizer' in modules_to_save"):
        model.train()(**inputs("vqgan"))


@pytest.mark.parametrize("kind", ["vae", "vqgan"])
def test_the_plain_trainer_trains_and_accumulates(kind):
    torch.manual_seed(0)
    if kind == "vae":
        rows = [{"input_ids": r, "labels": r, "attention_mask": torch.ones(8)} for r in torch.randint(0, 50, (8, 8))]
    else:
        rows = [{"pixel_values": r, "labels": r} for r in torch.rand(8, 3, 16, 16) * 2 - 1]
    steps = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = small(kind, **({"entropy_weight": 0.0, "temperature": 0.0} if kind == "vqgan" else {}))
        if kind == "vqgan":
            # Moved once per forward, the codebook would tell four micro-batches from one batch.
            model.quantizer.update_in_forward = False
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        args = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1,
            learning_rate=0.1, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant", use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    assert max(float(step.abs().max()) for step in steps[0].values()) > 0
    for name, step in steps[0].items():
        torch.testing.assert_close(step, steps[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_models_say_whether_they_divide_the_loss():
    assert not any(kind.accepts_loss_kwargs for kind in (TokComVAE, TokComModel, VQGAN))
