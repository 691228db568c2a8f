"""equip_internvl: what every key of the configuration does, on transformers' InternVL and on remote code."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.helpers.joint_lfq_run import TEXT, VISION
from tokcom_hf import JointLFQModel, JointLFQTrainer, JointLFQTrainingArguments, LFQExpandedModel, equip_internvl
from tokcom_hf.data.captions import JointLFQCollator, scene_caption_rows
from tokcom_hf.data.vqa import VQACollator
from tokcom_hf.evaluation.lfq_bases import next_id_loss
from tokcom_hf.models import lfq_tables
from tokcom_hf.small_models.small_internvl import build_small_internvl

QUANTIZER = {
    "output_dim": 6, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def small(seed=0):
    torch.manual_seed(seed)
    return build_small_internvl(VISION, TEXT)


def config(**expansion):
    return {"model": {"vocab_expansion": expansion}, "quantizer": dict(QUANTIZER)}


def trainer_of(model, processor, output, **changes):
    torch.set_num_threads(1)
    arguments = {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "report_to": "none",
    }  # fmt: skip
    return JointLFQTrainer(
        model,
        JointLFQTrainingArguments(**arguments | changes),
        train_dataset=scene_caption_rows(8, 0, 1, image_size=32),
        eval_dataset=scene_caption_rows(4, 1, 1, image_size=32),
        data_collator=JointLFQCollator(processor),
        generation_collator=VQACollator(processor, answers=False),
    )


def step(trainer):
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    trainer.compute_loss(trainer.model.train(), batch).backward()


def test_a_plain_mapping_makes_a_model_ready_for_joint_training(tmp_path):
    base, processor = small()
    old = len(base.get_input_embeddings().weight)
    model = equip_internvl(base, config(enabled=True, embedding_init_method="random", freeze_original=True))
    assert isinstance(model, JointLFQModel) and model.language_model.config.vocab_size == old + 64
    assert model.quantizer.config.num_tokens == 4 and model.quantizer.config.input_size == 32
    assert [getattr(model.quantizer.config, key) for key in QUANTIZER] == list(QUANTIZER.values())
    trainer = trainer_of(model, processor, tmp_path)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_generation_loss"])


def test_defaults_are_the_documented_ones():
    base, _ = small()
    model = equip_internvl(base, {"lfq": {**QUANTIZER}})
    assert model.language_model.config.embedding_init_method == "random"
    assert model.language_model.config.embedding_init_std == 0.02 and model.language_model.config.freeze_original


@pytest.mark.parametrize("place", ["quantizer", "lfq", "model.quantizer", "model.lfq"])
def test_an_omegaconf_object_and_every_place_of_the_quantizers_settings(place):
    from omegaconf import OmegaConf

    settings = OmegaConf.create({"bits": 5, "train": {"lr": 1}})
    OmegaConf.update(settings, place, QUANTIZER | {"output_dim": "${bits}"}, force_add=True)
    base, _ = small()
    start = len(base.get_input_embeddings().weight)
    model = equip_internvl(base, settings)
    assert model.language_model.lfq_token_range == (start, start + 32) and model.quantizer.config.output_dim == 5


def test_the_model_is_loaded_from_its_name_or_from_internvl_path(tmp_path):
    base, _ = small()
    base.save_pretrained(tmp_path)
    for model, path in ((None, str(tmp_path)), (str(tmp_path), None)):
        settings = config()
        settings["model"]["internvl_path"] = path
        made = equip_internvl(model, settings)
        assert torch.equal(made.base.get_input_embeddings().weight, base.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=r"no model to equip: give one, or set config\.model\.internvl_path"):
        equip_internvl(None, config())


@pytest.mark.parametrize("method", ["random", "zeros", "mean"])
def test_start_of_the_new_rows(method):
    base, _ = small()
    rows = {}
    for std in (0.02, 0.5):
        torch.manual_seed(0)
        model = equip_internvl(small()[0], config(embedding_init_method=method, embedding_init_std=std))
        rows[std] = model.language_model.lfq_rows.embedding.detach()
    mean = base.get_input_embeddings().weight.mean(0)
    for std, table in rows.items():
        if method == "zeros":
            assert not table.any()
        else:
            centre = mean if method == "mean" else torch.zeros_like(mean)
            assert (table - centre).std().item() == pytest.approx(std, rel=0.15)
            torch.testing.assert_close(table.mean(0), centre, atol=5 * std / 8 if method == "random" else 1e-5, rtol=0)


def test_wrong_configurations_say_what_is_wrong():
    base, _ = small()
    for settings, error, message in (
        (
            {"model": {"vocab_expansion": {"embedding_init": "mean"}}},
            ValueError,
            "vocab_expansion has no embedding_init; ",
        ),
        ({"model": {"path": "x"}}, ValueError, r"config\.model has no path; it knows internvl_path"),
        (config(enabled="yes"), ValueError, "enabled must be true or false, got 'yes'"),
        (config(embedding_init_method="median"), ValueError, "must be one of random, zeros, mean, got 'median'"),
        ({"quantizer": {"bits": 6}}, ValueError, "quantizer has no bits; it knows input_size"),
        ({"quantizer": QUANTIZER, "lfq": QUANTIZER}, ValueError, "twice, in config.quantizer and config.lfq"),
        ({"quantizer": QUANTIZER | {"input_size": 4096}}, ValueError, "maps width 4096 to width 32, but projected"),
        ("joint_lfq.yaml", TypeError, "config must be a mapping or an object of OmegaConf, got str"),
    ):
        with pytest.raises(error, match=message):
            equip_internvl(base, settings)


def test_without_expansion_the_vocabulary_stays_and_the_quantizer_trains(tmp_path):
    base, processor = small()
    old = len(base.get_input_embeddings().weight)
    model = equip_internvl(base, config(enabled=False))
    assert model.language_model is base and len(base.get_input_embeddings().weight) == old and not model.new_rows()
    with pytest.raises(ValueError, match=r"no LFQ ids.*generation_weight 1\.0.*set it to 0"):
        trainer_of(model, processor, tmp_path)
    trainer = trainer_of(
        model, processor, tmp_path, generation_weight=0.0, reconstruction_weight=0.0, entropy_weight=0.0
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    loss, output = trainer.compute_loss(model.eval(), batch, return_outputs=True)
    assert output.generation_loss is None and output.continuous_kl.abs() < 1e-6
    # KL over the vocabulary that there is, by its definition.
    teacher = trainer.teacher_logits(model.image_features(batch["pixel_values"]), batch).log_softmax(-1)
    student = output.quantized_logits.log_softmax(-1)
    assert output.quantized_kl.item() == pytest.approx(
        (teacher.exp() * (teacher - student)).sum(-1).mean().item(), rel=1e-4
    )
    assert loss.item() == pytest.approx(25 * (output.quantized_kl + output.continuous_kl).item(), rel=1e-5)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("quantizer.from_bits") for name in moved)
    assert "language_model.model.language_model.embed_tokens.weight" not in moved
    metrics = trainer.evaluate()
    assert (
        not [name for name in metrics if "generation" in name or "lfq_mass" in name]
        and metrics["eval_quantized_kl"] > 0
    )
    assert not any("joint/generation_loss" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("remote", [False, True])
def test_a_quantizer_of_vision_features(tmp_path, remote):
    """It reads what the projector is given; the teacher and the continuous student see what the projector makes of it."""
    base, processor = small()
    projector = base.model.multi_modal_projector
    if remote:
        base = chat_model(processor, ProjectingChatModel)
        projector = base.mlp1
    settings = config()
    settings["model"]["quantizer_input"] = "vision"
    model = equip_internvl(base, settings, processor.tokenizer)
    assert model.quantizer.config.input_size == (24 if remote else 64) and model.quantizer.config.llm_hidden_size == 32
    with pytest.raises(ValueError, match="set quantizer_start_images to 0"):
        trainer_of(model, processor, tmp_path).start_quantizer()
    trainer = trainer_of(model, processor, tmp_path, quantizer_start_images=0, tune_llm=False)
    assert math.isnan(trainer.start_quantizer()) and not projector._forward_pre_hooks
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    features, read = model.see(batch["pixel_values"])
    assert torch.equal(projector(read), features) and read.shape == (4, 4, model.quantizer.config.input_size)
    _, output = trainer.compute_loss(model.eval(), dict(batch), return_outputs=True)
    assert torch.equal(output.quantizer.codes, model.quantizer.encode(read))
    target = (output.quantizer.embeddings - features).square().mean() / features.square().mean()
    assert output.quantizer.reconstruction_loss.item() == pytest.approx(target.item(), rel=1e-5)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_quantized_kl"])
    with pytest.raises(ValueError, match="must be one of projected, vision, got 'pixels'"):
        JointLFQModel(base, model.quantizer, "pixels")
    with pytest.raises(ValueError, match="has neither `multi_modal_projector` nor `mlp1`"):
        equip_internvl(chat_model(processor), settings)


@pytest.mark.parametrize("tune_llm", [True, False])
def test_old_rows_train_where_they_are_not_frozen(tmp_path, tune_llm):
    ends = {}
    for frozen in (True, False):
        base, processor = small()
        model = equip_internvl(base, config(freeze_original=frozen))
        trainer = trainer_of(model, processor, tmp_path / str(frozen), tune_llm=tune_llm)
        table = model.language_model.get_input_embeddings()
        before = table.weight
        # The teacher is what the base was, wherever the base moves.
        assert (trainer.teacher is None) == (frozen and not tune_llm)
        trainer.train()
        old = model.language_model.lfq_token_range[0]
        ends[frozen] = not torch.equal(table.weight[:old], before[:old])
        assert not torch.equal(table.weight[old:], before[old:])
        assert table.trainable_mask.sum() == (64 if frozen else old + 64)
        names = {group["name"] for group in trainer.optimizer.param_groups}
        assert ("old_rows_matrices" in names) == (not frozen)
    assert ends == {True: False, False: True}


def test_training_never_joins_the_tables(tmp_path, monkeypatch):
    base, processor = small()
    trainer = trainer_of(equip_internvl(base, config()), processor, tmp_path)
    joined = []
    join = lfq_tables.join_tables
    monkeypatch.setattr(lfq_tables, "join_tables", lambda old, new: joined.append(len(old)) or join(old, new))
    trainer.train()
    assert joined == []
    assert trainer.model.language_model.get_input_embeddings().weight.shape[1] == 32 and len(joined) == 1


def test_gradients_that_can_be_read(tmp_path):
    """`.weight.grad`: None before a backward, then zero on old rows that are frozen, and the new rows' own gradient."""
    base, processor = small()
    model = equip_internvl(base, config())
    trainer = trainer_of(model, processor, tmp_path)
    table = model.language_model.get_input_embeddings()
    assert table.weight.grad is None
    step(trainer)
    old = model.language_model.lfq_token_range[0]
    gradient = table.weight.grad
    assert gradient.shape == table.weight.shape and not gradient[:old].any()
    assert torch.equal(gradient[old:], model.language_model.lfq_rows.embedding.grad) and gradient.norm() > 0
    head = model.language_model.get_output_embeddings()
    assert torch.equal(head.weight.grad[old:], model.language_model.lfq_rows.tables()[0].grad)
    assert head.trainable_mask.sum() == 64 and not head.trainable_mask[:old].any()


def test_logged_names(tmp_path):
    base, processor = small()
    trainer = trainer_of(equip_internvl(base, config()), processor, tmp_path)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    names = {"generation_loss", "understanding_loss", "quantized_kl", "continuous_kl", "entropy_weight", "lfq_mass"}
    assert {name for name in row if name.startswith("joint/")} == {f"joint/{name}" for name in names}
    assert row["joint/understanding_loss"] == pytest.approx(row["joint/quantized_kl"] + row["joint/continuous_kl"])
    quantizer = {"reconstruction_loss", "entropy_loss", "bit_mean_min", "bit_mean_max", "batch_utilization"}
    assert {f"lfq/{name}" for name in quantizer} <= set(row)


# ---------------------------------------------------------------------------------------------- remote code
class ChatConfig(PreTrainedConfig):
    """As InternVL's remote code writes it."""

    model_type = "internvl_chat_for_tests"

    def __init__(self, llm_config=None, **kwargs):
        self.llm_config = LlamaConfig(**(llm_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.llm_config


class InternVLChatModel(PreTrainedModel):
    """Its forward asks for a picture; features come from `extract_feature`, generation from `language_model`."""

    config_class = ChatConfig

    def __init__(self, config):
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config.llm_config)
        self.vision_model = torch.nn.Conv2d(3, 32, 16, stride=16)
        self.num_image_token, self.img_context_token_id = 4, None

    def extract_feature(self, pixel_values):
        return self.vision_model(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values, input_ids, attention_mask=None, labels=None):
        raise AssertionError("joint training shows this model features, not pictures")

    def generate(self, pixel_values, input_ids, **kwargs):
        raise AssertionError("its own generate draws its features from pictures")


class ProjectingChatModel(InternVLChatModel):
    """With a projector, as InternVL has one."""

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = torch.nn.Conv2d(3, 24, 16, stride=16)
        self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(24), torch.nn.Linear(24, 32))

    def extract_feature(self, pixel_values):
        return self.mlp1(super().extract_feature(pixel_values))


def chat_model(processor, model_class=InternVLChatModel, **changes):
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = model_class(ChatConfig(llm_config=text | changes))
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_remote_code_with_a_language_model_and_an_llm_config(tmp_path, tied):
    _, processor = small()
    base = chat_model(processor, tie_word_embeddings=tied)
    model = equip_internvl(base, config(embedding_init_method="mean"), processor.tokenizer)
    old = len(processor.tokenizer)
    assert isinstance(model.language_model, LFQExpandedModel) and model.quantizer.config.num_tokens == 4
    assert model.language_model.config.vocab_size == old + 64
    trainer = trainer_of(model, processor, tmp_path, max_steps=8)
    # The loss of drawing, and its gradient, from the language model's own logits of old and new ids.
    ids, rows = torch.tensor([[3, old + 5, old + 63, old]]), list(model.language_model.lfq_rows.parameters())
    labels = ids.masked_fill(ids < old, -100)
    logits = model.base.language_model(input_ids=ids).logits[0, :-1]
    losses = (
        next_id_loss(model.language_model, ids, torch.ones_like(ids), labels),
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]),
    )
    torch.testing.assert_close(*losses)
    for one, other in zip(*(torch.autograd.grad(loss, rows) for loss in losses)):
        torch.testing.assert_close(one, other)
    before = model.language_model.get_input_embeddings().weight
    first = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert 0 < after["eval_quantized_kl"] < first["eval_quantized_kl"]
    # A student that sees what the teacher sees answers as it does, before anything has trained.
    assert first["eval_continuous_agreement"] == 1
    weight = model.language_model.get_input_embeddings().weight
    assert torch.equal(weight[:old], before[:old]) and not torch.equal(weight[old:], before[old:])


def test_remote_code_that_was_not_told_its_image_token():
    _, processor = small()
    base = chat_model(processor)
    base.img_context_token_id = None
    model = equip_internvl(base, config())
    with pytest.raises(ValueError, match=r"InternVLChatModel names no image token; set its config\.image_token_id"):
        model.embed(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 32))
