"""JointLFQTrainer: the loss as documented, what moves and at which rate, resume, two ranks."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.helpers.joint_lfq_run import BITS, make_model, make_trainer, weights
from tests.helpers.processes import start
from tokcom_hf import JointLFQTrainingArguments, LFQExpandedModel
from tokcom_hf.models import shared_cross_entropy as chunked_cross_entropy
from tokcom_hf.trainers.lfq_joint_model import JointLFQModel
from tokcom_hf.trainers.lfq_normalizer import summed_log_normalizer


def batch_of(trainer, count=4):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(count)]))


# ---------------------------------------------------------------------------------------------- the loss
def test_defaults_are_the_documented_numbers(tmp_path):
    args = JointLFQTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.generation_weight, args.understanding_weight, args.caption_drop) == (1.0, 25.0, 0.1)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (1e-4, 0.9, 0.95, 0.05)


def test_the_loss_is_the_documented_sum_of_plain_transformers_forwards(tmp_path):
    """Every part computed anew with the merged model, full logits and the definitions."""
    trainer = make_trainer(tmp_path, caption_drop=0.0, entropy_anneal=0.0, entropy_weight_end=0.3)
    model = trainer.model.eval()
    with torch.no_grad():  # the student is no longer the teacher
        for parameter in model.llm_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inputs = batch_of(trainer)
    loss, out = trainer.compute_loss(model, inputs, return_outputs=True)

    with torch.no_grad():
        features = model.base.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        start, _ = model.language_model.lfq_token_range
        codes = model.quantizer.encode(features)
        ids = start + sum(codes[..., bit] * 2**bit for bit in range(BITS))
        embeddings = model.quantizer.decode(codes)
        plain = model.language_model.merge_and_unload()

        def answers(vlm, seen):
            text = vlm.get_input_embeddings()(inputs["input_ids"])
            text[inputs["input_ids"] == vlm.config.image_token_id] = seen.flatten(0, 1)
            logits = vlm(inputs_embeds=text, attention_mask=inputs["attention_mask"]).logits[:, :-1]
            # Over all ids that a model has: LFQ ids too for the student.
            return logits[inputs["labels"][:, 1:] != -100].log_softmax(-1)

        teacher = answers(trainer.teacher, features)
        assert teacher.shape[1] == start
        students = [answers(plain, seen) for seen in (embeddings, features)]
        kls = [(teacher.exp() * (teacher - told[:, :start])).sum(-1).mean() for told in students]
        masses = [told[:, start:].exp().sum(-1) for told in students]
        drawn = torch.cat([inputs["caption_ids"], ids], 1)
        mask = torch.cat([inputs["caption_mask"], torch.ones_like(ids)], 1)
        logits = plain(input_ids=drawn, attention_mask=mask).logits
        generation = torch.nn.functional.cross_entropy(logits[:, -5:-1].flatten(0, 1), ids.flatten())
    assert out.generation_loss.item() == pytest.approx(generation.item(), rel=1e-4)
    assert out.quantized_kl.item() == pytest.approx(kls[0].item(), rel=1e-3)
    assert out.continuous_kl.item() == pytest.approx(kls[1].item(), rel=1e-3) and kls[1] > 1e-3
    for mass, wanted in zip((out.lfq_mass, out.continuous_lfq_mass), masses, strict=True):
        torch.testing.assert_close(mass, wanted, atol=1e-5, rtol=1e-4)
    quantized = out.quantizer
    expected = generation + 25 * (kls[0] + kls[1]) + quantized.reconstruction_loss + 0.3 * quantized.entropy_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_continuous_student_starts_as_the_teacher(tmp_path):
    trainer = make_trainer(tmp_path)
    _, out = trainer.compute_loss(trainer.model.eval(), batch_of(trainer), return_outputs=True)
    # It differs by the probability alone that its new rows have.
    assert out.continuous_kl.item() == pytest.approx(-(1 - out.continuous_lfq_mass).log().mean().item(), abs=1e-6)
    assert out.quantized_kl > 0.01


def test_every_loss_trains_the_quantizer_through_its_bits(tmp_path):
    """Answers from quantized features have a gradient at the quantizer's first layer; drawing has none there."""
    trainer = make_trainer(tmp_path)
    out = trainer.compute_loss(trainer.model.eval(), batch_of(trainer), return_outputs=True)[1]
    first = trainer.model.quantizer.input_proj.weight
    (gradient,) = torch.autograd.grad(out.quantized_kl, first, retain_graph=True)
    assert gradient.abs().max() > 1e-6
    assert torch.autograd.grad(out.generation_loss, first, allow_unused=True)[0] is None


@pytest.mark.parametrize("tune_llm", [True, False])
def test_answers_hold_no_image_ids_without_being_told_so(tmp_path, tune_llm):
    """The KL sees LFQ ids: training takes away the probability that they have where an answer follows."""
    options = {"max_steps": 60, "learning_rate": 3e-3, "new_rows_learning_rate": 3e-2, "warmup_steps": 0}
    trainer = make_trainer(tmp_path, tune_llm=tune_llm, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_lfq_mass_first"] < 0.01 < before["eval_lfq_mass_first"]
    assert after["eval_continuous_lfq_mass"] < 0.05 < before["eval_continuous_lfq_mass"]
    inputs, model = batch_of(trainer), trainer.model.eval()
    features = model.quantizer(model.image_features(inputs["pixel_values"])).embeddings
    prompts = trainer._prepare_inputs(trainer.generation_collator([trainer.train_dataset[i] for i in range(4)]))
    torch.manual_seed(0)
    told = model.language_model.generate(
        inputs_embeds=model.embed(prompts["input_ids"], features),
        attention_mask=prompts["attention_mask"],
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=10,
    )
    assert (told >= model.language_model.lfq_token_range[0]).float().mean() < 0.05


@pytest.mark.parametrize("bias", [False, True])
def test_the_mass_of_new_ids_is_computed_in_parts(monkeypatch, bias):
    """Value and gradients of the normaliser equal those of plain autograd, with two rows of logits in memory at a time."""
    torch.manual_seed(0)
    hidden, old = (0.3 * torch.randn(9, 32)).requires_grad_(), torch.randn(9, requires_grad=True)
    tables = [torch.randn(64, 32, requires_grad=True)] + ([torch.randn(64, requires_grad=True)] if bias else [])
    logits = torch.nn.functional.linear(hidden, *tables)
    whole = torch.logaddexp(old, logits.logsumexp(-1))
    expected = torch.autograd.grad(3 * whole.sum(), [hidden, old, *tables], retain_graph=True)
    monkeypatch.setattr(chunked_cross_entropy, "LOGITS_AT_ONCE", 2 * 64)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    total, rows, mass = summed_log_normalizer(hidden, old, tables[0], tables[1] if bias else None)
    assert made == [(2, 64)], "one piece of logits serves all parts"
    torch.testing.assert_close(rows, whole)
    torch.testing.assert_close(total, whole.sum())
    torch.testing.assert_close(mass, (logits.logsumexp(-1) - whole).exp())
    assert not rows.requires_grad and not mass.requires_grad
    got = torch.autograd.grad(3 * total, [hidden, old, *tables])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not summed_log_normalizer(hidden, old, tables[0], None)[0].requires_grad
    # Under autocast products are bfloat16, sums float32.
    with torch.autocast("cpu", torch.bfloat16):
        cast = summed_log_normalizer(hidden, old, tables[0], tables[1] if bias else None)[0]
    assert cast.dtype == torch.float32 and cast.item() == pytest.approx(total.item(), rel=0.01)
    for a, b in zip(torch.autograd.grad(3 * cast, [hidden, old, *tables]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_gradients_of_the_kl_are_those_of_its_formula(tmp_path):
    model = make_trainer(tmp_path).model.eval()
    torch.manual_seed(0)
    states, teacher = torch.randn(7, 32, requires_grad=True), torch.randn(7, model.tables()[0].shape[0])
    rows = model.language_model.lfq_rows
    logits = torch.cat([model.language_model.original_logits(states), rows(states, as_head=True)], -1).log_softmax(-1)
    wanted = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits[:, : teacher.shape[1]])).sum(-1).mean()
    kl, _, _ = model.compare(teacher, states)
    torch.testing.assert_close(kl, wanted)
    for a, b in zip(
        *(torch.autograd.grad(loss, [states, *rows.parameters()], allow_unused=True) for loss in (kl, wanted))
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_what_trains_over_a_bfloat16_base_is_float32(tmp_path):
    for tune_llm in (True, False):
        model, _ = make_model()
        model.base.bfloat16()
        model.quantizer.bfloat16()
        model.set_trainable(tune_llm)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model.base.dtype == (torch.float32 if tune_llm else torch.bfloat16)


def test_entropy_weight_falls_linearly_and_stays(tmp_path):
    trainer = make_trainer(tmp_path, entropy_weight=1.0, entropy_weight_end=0.2, entropy_anneal=0.5)
    trainer.state.max_steps = 100
    scales = []
    for step in (0, 25, 50, 99):
        trainer.state.global_step = step
        scales.append(trainer.entropy_scale)
    assert scales == pytest.approx([1.0, 0.6, 0.2, 0.2])


# ---------------------------------------------------------------------------------------------- caption drop
def test_caption_drop_hides_whole_captions_at_the_given_share(tmp_path):
    trainer = make_trainer(tmp_path, caption_drop=0.1)
    mask = torch.ones(4000, 5, dtype=torch.long)
    mask[::2, :2] = 0  # padding
    hidden = trainer.drop_captions(mask)
    gone = hidden[:, :-1].sum(1) == 0
    assert gone.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(hidden[~gone], mask[~gone]) and hidden[:, -1].all()
    assert not torch.equal(trainer.drop_captions(mask), hidden)  # the next batch of the same step
    trainer.args.caption_drop = 0.0
    assert torch.equal(trainer.drop_captions(mask), mask)
    trainer.args.caption_drop = 1.0
    assert trainer.drop_captions(mask)[:, :-1].sum() == 0


def test_a_resumed_run_drops_the_same_captions(tmp_path):
    mask = torch.ones(64, 3, dtype=torch.long)
    draws = []
    for _ in range(2):
        trainer = make_trainer(tmp_path)
        trainer.state.global_step = 7
        draws.append(trainer.drop_captions(mask))
    assert torch.equal(*draws)
    trainer.state.global_step = 8
    assert not torch.equal(trainer.drop_captions(mask), draws[0])


def test_hidden_captions_do_not_influence_the_drawing(tmp_path):
    trainer = make_trainer(tmp_path, caption_drop=1.0)
    inputs = batch_of(trainer)
    model = trainer.model.eval()
    codes = torch.randint(2, (4, 4, BITS))
    mask = trainer.drop_captions(inputs["caption_mask"])
    words = inputs["caption_ids"].clone()
    words[:, :-1] = words[:, :-1].flip(0)
    losses = [model.generation_loss(codes, ids, mask) for ids in (inputs["caption_ids"], words)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    seen = [model.generation_loss(codes, ids, inputs["caption_mask"]) for ids in (inputs["caption_ids"], words)]
    assert abs(seen[0] - seen[1]) > 1e-4


# ---------------------------------------------------------------------------------------------- what moves
def parts_of(name: str) -> str:
    if name.startswith("quantizer"):
        return "quantizer"
    if "lfq_rows" in name:
        return "new rows"
    frozen = ("embed_tokens", "lm_head", "vision_tower", "multi_modal_projector")
    return "frozen" if any(part in name for part in frozen) else "llm"


@pytest.mark.parametrize("tune_llm", [True, False])
def test_what_moves_and_what_stays_bitwise(tmp_path, tune_llm):
    trainer = make_trainer(tmp_path, tune_llm=tune_llm, max_steps=3, weight_decay=0.3, bf16=tune_llm)
    before = weights(trainer)
    teacher = {n: p.clone() for n, p in trainer.teacher.state_dict().items()} if tune_llm else {}
    trainer.train()
    moved: dict[str, set[bool]] = {}
    for name, value in weights(trainer).items():
        moved.setdefault(parts_of(name), set()).add(not torch.equal(value, before[name]))
    assert moved == {"quantizer": {True}, "new rows": {True}, "frozen": {False}, "llm": {tune_llm}}
    assert (trainer.teacher is not None) == tune_llm
    if tune_llm:
        assert all(torch.equal(p, teacher[n]) for n, p in trainer.teacher.state_dict().items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in held for p in trainer.model.tables())
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    wanted = {
        "joint/generation_loss",
        "joint/quantized_kl",
        "joint/continuous_kl",
        "joint/entropy_weight",
        "joint/lfq_mass",
    }
    wanted |= {"lfq/bit_mean_min", "lfq/bit_mean_max", "lfq/batch_utilization", "lfq/batch_utilization_ceiling"}
    assert wanted <= set(line)
    assert line["lfq/batch_utilization_ceiling"] == pytest.approx(1 - (1 - 1 / 64) ** 16)
    assert 0 < line["joint/lfq_mass"] < 1 and line["joint/continuous_kl"] > 0


def test_a_started_quantizer_resembles_the_features_and_is_alike_every_time(tmp_path):
    fresh = make_trainer(tmp_path).evaluate()["eval_reconstruction_loss"]
    ends, losses, errors = [], [], []
    for steps in (2, 100, 100):
        options = {"quantizer_start_images": 30, "quantizer_start_learning_rate": 5e-3}
        trainer = make_trainer(tmp_path, quantizer_start_steps=steps, **options)
        frozen = {n: p.clone() for n, p in trainer.model.language_model.named_parameters()}
        errors.append(trainer.start_quantizer())
        assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.language_model.named_parameters())
        losses.append(trainer.evaluate()["eval_reconstruction_loss"])
        ends.append(weights(trainer))
    assert max(losses) < 0.6 * fresh and errors[1] < errors[0] < 1
    assert all(torch.equal(value, ends[2][name]) for name, value in ends[1].items())


def test_every_part_has_its_own_learning_rate_and_vectors_no_decay(tmp_path):
    rates = {"quantizer_learning_rate": 3e-3, "new_rows_learning_rate": 5e-3, "llm_learning_rate": None}
    trainer = make_trainer(tmp_path, **rates, learning_rate=1e-4, weight_decay=0.05)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "quantizer_matrices": 3e-3,
        "quantizer_vectors": 3e-3,
        "new_rows_matrices": 5e-3,
        "llm_matrices": 1e-4,
        "llm_vectors": 1e-4,
    }
    assert all(group["weight_decay"] == (0.05 if "matrices" in name else 0) for name, group in groups.items())
    counted = sum(p.numel() for group in groups.values() for p in group["params"])
    assert counted == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path / str(checkpointing), max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        ends.append(weights(trainer))
    assert all(torch.allclose(value, ends[1][name], atol=1e-6) for name, value in ends[0].items())


def test_a_bad_loss_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.quantizer.to_bits.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss became nan at step 1"):
        trainer.train()


# ---------------------------------------------------------------------------------------------- wrong use
def test_bad_arguments_are_refused(tmp_path):
    for changes, message in (
        ({"caption_drop": 1.5}, "caption_drop is a share between 0 and 1, got 1.5"),
        ({"entropy_anneal": -0.1}, "entropy_anneal is a share"),
        ({"understanding_weight": -1.0}, "understanding_weight must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            JointLFQTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    arguments = JointLFQTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fp16 = True
    with pytest.raises(ValueError, match="bf16 or fp32"):
        arguments.__post_init__()


def test_parts_that_do_not_fit_are_refused():
    model, _ = make_model()
    with pytest.raises(ValueError, match=r"maps width 32 to width 24, .* width 32"):
        make_model(llm_hidden_size=24)
    with pytest.raises(ValueError, match="64 LFQ ids and the quantizer 32 codes"):
        make_model(output_dim=5)
    text = LlamaConfig(vocab_size=10, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    blind = LFQExpandedModel.from_base(LlamaForCausalLM(text), BITS)
    with pytest.raises(ValueError, match="LlamaForCausalLM sees no images"):
        JointLFQModel(blind, model.quantizer)
    with pytest.raises(ValueError, match="hold 3 image tokens for 4 image features"):
        model.embed(torch.full((1, 3), model.base.config.image_token_id), torch.zeros(1, 4, 32))


# ---------------------------------------------------------------------------------------------- evaluation
def test_evaluation_reports_losses_agreement_and_bits(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    assert metrics["eval_generation_chance"] == pytest.approx(math.log(64))
    assert metrics["eval_continuous_agreement"] == 1
    assert 0 < metrics["eval_lfq_mass"] < 1 and 0 < metrics["eval_lfq_mass_first"] < 1
    # At the start the student differs from its teacher by the probability of LFQ ids: −ln(1 − mass) ≥ mass.
    assert metrics["eval_continuous_kl"] >= metrics["eval_continuous_lfq_mass"] > 0
    assert metrics["eval_quantized_kl"] > 0 and 0 <= metrics["eval_agreement"] <= 1
    assert metrics["eval_tokens"] == 48 and metrics["eval_questions"] == 12
    assert metrics["eval_utilization_ceiling"] == pytest.approx(1 - (63 / 64) ** 48)
    again = trainer.evaluate()
    assert {k: v for k, v in again.items() if k != "epoch"} == {k: v for k, v in metrics.items() if k != "epoch"}
    # Codes and losses as one pass over all rows gives them, captions shown and hidden.
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[i] for i in range(12)]))
    model = trainer.model.eval()
    codes = model.quantizer.encode(model.image_features(inputs["pixel_values"]))
    assert metrics["eval_active"] == len(model.codes_to_ids(codes).unique())
    assert metrics["eval_bit_mean_max"] == pytest.approx(codes.float().mean((0, 1)).max().item())
    shown, hidden = inputs["caption_mask"], torch.zeros_like(inputs["caption_mask"])
    hidden[:, -1] = 1
    for name, mask in (("generation_loss", shown), ("generation_loss_no_caption", hidden)):
        loss = model.generation_loss(codes, inputs["caption_ids"], mask).item()
        assert metrics[f"eval_{name}"] == pytest.approx(loss, rel=1e-4)


# ---------------------------------------------------------------------------------------------- resume and ranks
class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
def test_resume_after_a_stop_or_a_kill_ends_bitwise_where_an_undisturbed_run_does(tmp_path):
    whole = make_trainer(tmp_path / "whole", tune_llm=True)
    whole.train()
    expected = weights(whole)
    stopped = make_trainer(tmp_path / "stopped")
    stopped.add_callback(StopAt(4))
    stopped.train()
    assert start("joint_lfq_run", tmp_path / "killed", "--kill", check=False) == -9
    for name in ("stopped", "killed"):
        assert not (tmp_path / name / "checkpoint-6").exists()
        resumed = make_trainer(tmp_path / name)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        end = weights(resumed)
        assert [key for key, value in expected.items() if not torch.equal(value, end[key])] == []
    saved = (tmp_path / "whole" / "checkpoint-6" / "model.safetensors").stat().st_size
    trained = sum(p.numel() * 4 for p in whole.model.parameters() if p.requires_grad)
    assert trained <= saved < trained + 20_000  # nothing of the frozen rest
