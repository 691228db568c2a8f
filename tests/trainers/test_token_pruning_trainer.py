"""TokenPruningTrainer: what moves, what is logged, resume after kill -9, two ranks."""

import pytest
import torch

from tests.helpers.processes import start
from tests.helpers.pruned_vlm_tools import mixed_sizes, tiny_vlm
from tests.helpers.pruning_run import fingerprint, make_trainer
from tokcom_hf import LayerPruner, LayerPrunerConfig, PrunedVLM, TokenMergerConfig, TokenPruningTrainingArguments
from tokcom_hf.trainers.pruning_attention_guidance import attention_reader, guidance_loss, read_share, reading_scores
from tokcom_hf.trainers.pruning_losses import annealed_temperature, answer_kl, binarization_loss, keep_rate_loss

LOGGED = [
    "token_merger/merge_sparsity_loss",
    "layer_pruners/adv_loss",
    "layer_pruners/task_loss",
    "layer_pruners/keep_rate_loss",
    "discriminator/real_loss",
    "discriminator/fake_loss",
    "discriminator/prob_real",
    "discriminator/prob_fake",
    "pruning/temperature",
    "pruning/kept_from_layer_1",
    "mask_layer_1/mean",
    "mask_layer_3/max",
]


def test_losses_on_numbers_worked_out_by_hand():
    assert annealed_temperature(0.0, 1.0, 0.1, 0.5) == 1.0
    assert annealed_temperature(0.25, 1.0, 0.1, 0.5) == pytest.approx(0.55)
    assert annealed_temperature(0.9, 1.0, 0.1, 0.5) == pytest.approx(0.1)
    assert keep_rate_loss([torch.tensor([0.5, -1.0])]) == pytest.approx(0.125)
    assert binarization_loss([torch.tensor([[0.0, 1.0, 0.5]])]) == pytest.approx(0.25 / 2)
    teacher, student = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    student[0, 1] = torch.tensor([0.0, 5.0])
    teacher[0, 0] = torch.tensor([9.0, 0.0])
    labels = torch.tensor([[-100, -100, 1]])
    expected = torch.log(torch.tensor(0.5)) - 0.5 * student[0, 1].log_softmax(-1).sum()
    assert answer_kl(teacher, student, labels) == pytest.approx(expected.item(), rel=1e-5)


def test_heads_and_discriminator_learn_and_the_base_does_not(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=3, discriminator_reinit_probability=0.0)
    heads = fingerprint(trainer)
    frozen = {n: p.clone() for n, p in trainer.model.base.named_parameters()}
    trainer.train()
    assert all(not torch.equal(value, heads[name]) for name, value in fingerprint(trainer).items())
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.base.named_parameters())
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert not [name for name in LOGGED if name not in line]
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(rates) == 2
    metrics = trainer.evaluate()
    assert {"eval_accuracy_hard", "eval_accuracy_under_budget", "eval_flops_ratio"} <= set(metrics)
    assert trainer.unwrapped_model.token_report()["vision_tokens_per_layer"] == pytest.approx(
        [10, 6, 6, 3, 3], abs=1e-4
    )


def test_guidance_reaches_images_of_every_size():
    torch.manual_seed(0)
    merger = TokenMergerConfig(feature_size=32, question_size=32, target_merge_tokens=3, internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm("qwen2_5_vl"), merger)
    inputs = mixed_sizes()
    with torch.no_grad():
        reader, attention = attention_reader(model)
        unpruned = reader(**inputs, pruning_mode="origin").logits
    assert torch.allclose(unpruned, model(**inputs, pruning_mode="origin").logits, atol=1e-5)
    assert model.base.config.text_config._attn_implementation == "sdpa" and len(attention) == 4
    with reading_scores(model) as said:
        output = model(**inputs, pruning_mode="soft")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    loss = guidance_loss(model, attention, said, output.kept_index, ids, mask)
    share = read_share(attention, (ids != 99))[0]
    by_hand = []
    for scores, places in zip(said["merger"], (slice(2, 6), slice(7, 22))):
        target = share[places] / share[places].sum()
        by_hand.append(-(target * scores[0].log_softmax(-1)).sum())
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    loss.backward()
    assert model.token_merger.scorer[-1].weight.grad.abs().sum() > 0


def test_mask_statistics_are_about_vision_tokens(tmp_path):
    trainer = make_trainer(tmp_path, adversarial_weight=0.0, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    trainer.log_scalars = lambda prefix, values: logged.update({f"{prefix}/{k}": float(v) for k, v in values.items()})
    logged: dict = {}
    with torch.no_grad():
        for head in trainer.model.layer_pruner.heads.values():
            head.score[-1].weight.zero_()
        trainer.compute_loss(trainer.model, batch)
    # Without noise all ten merged tokens have one score: a soft mask of 1/2, but 1 on text and padding.
    assert logged["mask_layer_1/max"] < 0.99 and logged["mask_layer_1/mean"] == pytest.approx(0.5, abs=0.2)
    assert logged["pruning/kept_from_layer_1"] == 6 and logged["pruning/kept_from_layer_3"] == 3


def test_lora_learns_and_merges_without_changing_the_answer(tmp_path):
    trainer = make_trainer(tmp_path, lora_r=2, adversarial_weight=0.0, max_steps=3, gradient_checkpointing=True)
    trainer.train()
    model = trainer.unwrapped_model.eval()
    inputs = trainer.data_collator([trainer.eval_dataset[i] for i in range(3)])
    with torch.no_grad():
        before = model(**inputs).logits
        trainer.merge_lora()
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


def test_guidance_raises_what_the_text_reads(tmp_path):
    # One row, four vision tokens, text at the end that reads the second of them in one head.
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, 1, 5, 1] = 0.8
    attention[0, 0, 4, 2] = 0.2
    attention[0, 0, 1, 3] = 1.0  # a vision token's reading does not count
    text = torch.tensor([[False] * 4 + [True] * 2])
    share = read_share([attention[:, :1], attention[:, 1:]], text)
    assert share[0].tolist() == pytest.approx([0, 0.8, 0.2, 0, 0, 0])
    trainer = make_trainer(tmp_path, guidance_weight=1.0, adversarial_weight=0.0, max_steps=2)
    before = fingerprint_of_heads(trainer)
    trainer.train()
    assert trainer.model.family.text_config._attn_implementation == "sdpa"
    assert any(not torch.equal(a, b) for a, b in zip(before, fingerprint_of_heads(trainer)))
    logged = [line for line in trainer.state.log_history if "layer_pruners/guidance_loss" in line]
    assert logged and all(line["layer_pruners/guidance_loss"] > 0 for line in logged)


def fingerprint_of_heads(trainer) -> list[torch.Tensor]:
    model = trainer.unwrapped_model
    return [p.detach().clone() for part in (model.token_merger, model.layer_pruner) for p in part.parameters()]


def test_straight_through_shows_the_hard_decision_and_teaches_dropped_tokens():
    torch.manual_seed(0)
    config = LayerPrunerConfig(hidden_size=8, layers=[1], keep_tokens=[2], internal_size=8, straight_through=True)
    output = LayerPruner(config).train()(1, torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    assert torch.equal(output.soft_mask > 0.5, output.keep_mask)
    assert torch.equal(output.soft_mask[output.keep_mask], torch.ones(4))
    output.keep_logits.retain_grad()
    # The loss falls steeply where a dropped token is let in: its logit must rise, by a bounded step.
    (-1e9 * output.soft_mask[~output.keep_mask].sum()).backward()
    gradient = output.keep_logits.grad
    assert (gradient[~output.keep_mask] < 0).all() and (gradient[output.keep_mask] == 0).all()
    assert gradient.abs().max() <= 0.5 * 0.25 + 1e-6


def test_best_model_prefers_those_under_budget(tmp_path):
    trainer = make_trainer(tmp_path, flops_budget=0.1)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_under_budget"] == pytest.approx(0.1 - metrics["eval_flops_ratio"])


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="temperature_end"):
        TokenPruningTrainingArguments(output_dir=str(tmp_path), temperature_end=2.0)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        TokenPruningTrainingArguments(output_dir=str(tmp_path), loss_warmup=3.0)
    arguments = TokenPruningTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fp16 = True
    with pytest.raises(ValueError, match="bf16 or fp32"):
        arguments.__post_init__()


@pytest.mark.slow
def test_resume_after_kill_ends_where_an_undisturbed_run_does(tmp_path):
    start("pruning_run", tmp_path / "whole")
    assert start("pruning_run", tmp_path / "killed", "--kill", check=False) == -9
    start("pruning_run", tmp_path / "killed", "resume")
    whole, killed = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    for name, value in whole["weights"].items():
        assert torch.equal(value, killed["weights"][name]), name
