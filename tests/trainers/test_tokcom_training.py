"""Training of the TokCom stages: losses and their units, what is frozen, bf16, gradient checkpointing, latents on disk."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tokcom_runs import (
    STAGES,
    Rows,
    block_model,
    denoiser_trainer,
    distillation_trainer,
    losses,
    posterior_model,
    posterior_trainer,
    row_model,
    row_trainer,
    vae_trainer,
)
from tests.helpers.tokcom_tools import seeded
from tokcom_hf.data.latent_rows import encode_rows
from tokcom_hf.models.modeling_tokcom import TokComModel, TokComOutput
from tokcom_hf.models.tokcom_objective import Blocks, add_flow_losses
from tokcom_hf.trainers.tokcom import draw_blocks
from tokcom_hf.trainers.tokcom_stages import some_chunks


def lines(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def frozen(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a VAE that writes rows that count up: through it, tokens can be told from latents."""
    vae = block_model().vae
    folder = tmp_path_factory.mktemp("vae")
    vae_trainer(folder, vae, Rows(counting=True), max_steps=100, learning_rate=1e-2, logging_steps=100).train()
    return vae.state_dict()


def test_vae_learns_and_logs_the_documented_names(tmp_path):
    vae = block_model().vae
    trainer = vae_trainer(tmp_path, vae, max_steps=120, learning_rate=1e-2, eval_strategy="steps", eval_steps=120)
    trainer.train()
    logged = lines(trainer, "vae/batch_loss")
    # Nats per token: a new model knows nothing of the 51 rows.
    assert logged[0] == pytest.approx(math.log(51), rel=0.02)
    assert logged[-1] < 0.5 * logged[0]
    final = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    for name in ("eval_token_accuracy", "eval_chunk_accuracy", "eval_token_accuracy_sigma_0.5"):
        assert 0 <= final[name] <= 1


@pytest.mark.parametrize("stage", ["denoiser", "posterior", "rows"])
def test_the_second_stage_leaves_the_vae_alone_and_its_losses_fall(tmp_path, stage, trained_vae):
    tokcom = {"denoiser": block_model, "posterior": posterior_model, "rows": row_model}[stage](
        time_distribution="logit_normal"
    )
    tokcom.vae.load_state_dict(trained_vae)
    vae, others = frozen(tokcom.vae), {name: value for name, value in frozen(tokcom).items() if name[:4] != "vae."}
    trainer = STAGES[stage](tmp_path, tokcom, Rows(counting=True), max_steps=50, learning_rate=1e-2)
    trainer.train()
    assert all(torch.equal(value, vae[name]) for name, value in tokcom.vae.state_dict().items())
    still = [
        name for name, value in tokcom.state_dict().items() if name in others and torch.equal(value, others[name])
    ]
    assert still == []
    names = ["loss", "diffusion/batch_ce_loss", "diffusion/batch_mse_loss", "diffusion/batch_flow_loss"]
    if stage != "rows":
        names += ["diffusion/batch_next_token_loss", "diffusion/batch_later_token_loss"]
    for name in names:
        logged = lines(trainer, name)
        assert len(logged) == 50 and sum(logged[-15:]) < 0.9 * sum(logged[:15]), name
    if stage == "rows":
        assert not lines(trainer, "diffusion/batch_next_token_loss")


@pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}])
def test_token_losses_are_nats_per_token_whatever_the_batch(tmp_path, changes):
    rows = Rows(length=48)
    trainer = denoiser_trainer(tmp_path, block_model(noise_draws=3), rows, max_steps=2, learning_rate=0.0, **changes)
    trainer.train()
    held_out = trainer.evaluate()
    for name in ("next_token", "later_token", "ce"):
        (first, *_) = lines(trainer, f"diffusion/batch_{name}_loss")
        # A new model gives each of the 51 ids the same chance.
        assert first == pytest.approx(math.log(51), rel=0.02), name
        assert held_out[f"eval_{name}_loss"] == pytest.approx(math.log(51), rel=0.02), name
    # Latents of variance 1 that are predicted as 0.
    assert lines(trainer, "diffusion/batch_mse_loss")[0] == pytest.approx(1.0, abs=0.25)


def test_logged_parts_add_up_to_the_loss(tmp_path):
    weights = {"mse_weight": 0.25, "cross_entropy_weight": 0.5, "head_weight": 2.0}
    trainer = denoiser_trainer(tmp_path, block_model(**weights), max_steps=2)
    trainer.train()
    for line in trainer.state.log_history[:2]:
        part = {name.split("batch_")[1]: value for name, value in line.items() if "batch_" in name}
        heads = part["next_token_loss"] + 0.2 * part["later_token_loss"]
        total = 0.25 * part["flow_loss"] + 0.5 * part["ce_loss"] + 2.0 * heads
        assert line["loss"] == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("batch", [4, 24])
def test_held_out_parts_add_up_to_the_held_out_loss(tmp_path, batch):
    # 6 rows: the last batch of 4 holds two.
    trainer = denoiser_trainer(
        tmp_path, block_model(cross_entropy_weight=0.5), Rows(6), per_device_eval_batch_size=batch
    )
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    heads = found["next_token_loss"] + 0.2 * found["later_token_loss"]
    assert found["loss"] == pytest.approx(found["flow_loss"] + 0.5 * found["ce_loss"] + heads, rel=1e-5)


def test_the_documented_row_is_encoded_once(tmp_path, monkeypatch):
    trainer = row_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.model.vae), "encode", lambda self, ids: pytest.fail("encoded again"))
    trainer.train()
    assert trainer.state.global_step == 6


def test_the_third_stage_moves_the_student_alone_and_its_losses_fall(tmp_path, trained_vae):
    trainer = distillation_trainer(tmp_path, rows=Rows(counting=True), max_steps=40, learning_rate=5e-3)
    trainer.teacher.vae.load_state_dict(trained_vae)
    teacher, student = frozen(trainer.teacher), frozen(trainer.model)
    trainer.train()
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.state_dict().items())
    assert not [name for name, value in trainer.model.state_dict().items() if torch.equal(value, student[name])]
    changed = {
        name for name, value in trainer.distilled().state_dict().items() if not torch.equal(value, teacher[name])
    }
    assert changed == set(student) and all(name.startswith("denoiser.") for name in changed)
    for name in ("loss", "distillation/batch_mse_loss", "distillation/batch_ce_loss"):
        logged = lines(trainer, name)
        assert sum(logged[-10:]) < 0.9 * sum(logged[:10]), name


def test_a_fraction_of_a_draw_trains_every_nth_block_and_evaluates_all(tmp_path, monkeypatch):
    calls, forward = [], TokComModel.forward

    def recorded(self, *given, **named):
        output = forward(self, *given, **named)
        calls.append((self.training, named, output.clean_latents.shape))
        return output

    monkeypatch.setattr(TokComModel, "forward", recorded)
    model = block_model(noise_draws=0.25, block_sizes=[1])
    trainer = denoiser_trainer(tmp_path, model, Rows(96, length=48), max_steps=24, per_device_train_batch_size=4)
    trainer.train()
    trainer.evaluate()
    trained = [(named, shape) for training, named, shape in calls if training]
    assert {named["block_stride"] for named, _ in trained} == {4}
    # Every token may be the first of a block.
    assert {draw_blocks(model.config, 48, seeded(seed))["offset"] for seed in range(200)} == set(range(16))
    assert all(shape[1] == -(-((48 - named["offset"]) // 4) // 4) for named, shape in trained)
    assert {shape[1] for training, _, shape in calls if not training} == {12}


def test_a_student_behind_a_posterior_moves_alone(tmp_path, trained_vae):
    teacher = posterior_model(time_distribution="logit_normal")
    teacher.vae.load_state_dict(trained_vae)
    posterior_trainer(tmp_path / "teacher", teacher, Rows(counting=True), max_steps=50, learning_rate=1e-2).train()
    trainer = distillation_trainer(
        tmp_path / "student", teacher, Rows(counting=True), max_steps=6, learning_rate=2e-3, teacher_steps=8
    )
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer.train()
    after = trainer.distilled().state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    # Recent tokens are a part of the student.
    assert changed == set(trainer.model.state_dict()) and {name.split(".")[0] for name in changed} == {
        "denoiser",
        "recent",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_with_finite_falling_losses_and_saves_float32(tmp_path, stage, trained_vae):
    trainer = STAGES[stage](tmp_path, rows=Rows(counting=True), bf16=True, max_steps=30, learning_rate=1e-2)
    if stage != "vae":
        getattr(trainer, "teacher", trainer.model).vae.load_state_dict(trained_vae)
    if stage == "posterior":
        # As the stages do it: the evidence is that of the VAE which is there when the flow's training begins.
        trainer.model.posterior.fit(trainer.model, some_chunks(Rows(counting=True), 4))
    seen = set()
    layer = next(
        module
        for module in trainer.model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    )
    layer.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    logged = losses(trainer)
    assert all(map(math.isfinite, logged)) and sum(logged[-8:]) < 0.9 * sum(logged[:8])
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert saved and {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_computes_layers_again_and_the_same_losses(tmp_path, stage):
    found = []
    for again in (False, True):
        trainer = STAGES[stage](tmp_path / str(again), max_steps=2, gradient_checkpointing=again)
        calls = []
        for name, module in trainer.model.named_modules():
            # `recent` is no layer of a transformer: its one MLP is kept.
            if name.endswith("mlp.up_proj") and not name.startswith("recent."):
                module.register_forward_pre_hook(lambda *given, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer.train()
        # Those without gradients, as self-conditioning's first prediction, have nothing to compute again.
        found.append((losses(trainer), sum(calls)))
    (plain, once), (checkpointed, twice) = found
    assert checkpointed == pytest.approx(plain, rel=1e-6) and twice == 2 * once


def test_a_batch_that_counts_nowhere_costs_nothing():
    tokcom = row_model()
    clean, labels = torch.randn(2, 1, 4, 16), torch.randint(0, 50, (2, 1, 4, 4))
    predicted = clean.clone().requires_grad_(True)
    for given in ({"t": 1.0}, {"labels": torch.full_like(labels, -100)}):
        output = TokComOutput(clean_latents=predicted)
        blocks = Blocks(clean, given.get("labels", labels), torch.zeros(1, dtype=torch.long), True)
        add_flow_losses(tokcom, output, blocks, torch.full((2, 1, 4), given.get("t", 0.5)))
        predicted.grad = None
        output.loss.backward()
        assert output.loss.item() == 0 and predicted.grad.abs().sum() == 0
        assert torch.isfinite(output.cross_entropy_loss) and torch.isfinite(output.mse_loss)


def test_sample_tables_are_written_and_need_held_out_rows(tmp_path):
    trainer = vae_trainer(tmp_path, sample_every=0.5, num_samples=2, max_steps=12)
    trainer.train()
    tables = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [table["epoch"] for table in tables] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert len(tables[0]["text"]) == len(tables[0]["reconstruction"]) == 2
    trainer = vae_trainer(tmp_path / "none", sample_every=1, max_steps=6)
    trainer.eval_dataset = None
    trainer.train()
    assert not (tmp_path / "none" / "samples.jsonl").exists()


def test_latents_on_disk_equal_the_encoder_and_are_reused(tmp_path):
    vae = block_model().vae.eval()
    rows = encode_rows(vae, Rows(), tmp_path / "latents.npy", batch_size=5)
    expected = vae.encode(Rows().ids)
    torch.testing.assert_close(torch.stack([rows[i]["latents"] for i in range(len(rows))]), expected)
    torch.testing.assert_close(rows.mean, expected.flatten(0, 1).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows.std, expected.flatten(0, 1).std(0, unbiased=False), atol=1e-5, rtol=1e-4)
    written = (tmp_path / "latents.npy").stat().st_mtime_ns
    encode_rows(vae, Rows(), tmp_path / "latents.npy")
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == written
    vae.embed_tokens.weight.data += 0.1
    changed = encode_rows(vae, Rows(), tmp_path / "latents.npy")
    assert not torch.allclose(changed[0]["latents"], expected[0])


def test_latents_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    file, vae = tmp_path / "latents.npy", block_model().vae
    encode, seen = type(vae).encode, []

    def fails_late(self, ids):
        # What another process would find meanwhile.
        seen.append(file.is_file() and np.load(file).shape[0])
        if len(seen) == 3:
            raise RuntimeError("no memory")
        return encode(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(type(vae), "encode", fails_late)
        with pytest.raises(RuntimeError, match="no memory"):
            encode_rows(vae, Rows(), file, batch_size=2)
    assert seen == [False] * 3 and not list(tmp_path.iterdir())
    first = encode_rows(vae, Rows(), file, batch_size=2)
    before = first[0]["latents"]
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(vae), "encode", fails_late)
        with pytest.raises(RuntimeError, match="no memory"):
            encode_rows(vae, Rows(6), file, batch_size=2)
    assert seen == [len(Rows())] * 3 and torch.equal(encode_rows(vae, Rows(), file)[0]["latents"], before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.json", "latents.npy"]
