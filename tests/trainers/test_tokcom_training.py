"""TokCom training: resume, two ranks, averaged weights, NaN, best model, latents on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tokcom_hf import (
    DenoiserTrainer,
    DenoiserTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.data.latent_rows import encode_rows
from tokcom_hf.models.modeling_tokcom_denoiser import DenoisedModelOutput
from tokcom_hf.trainers.base import check_output_dir, last_complete_checkpoint
from tokcom_hf.trainers.denoiser_loss import NoisedBatch, denoiser_loss

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
WORKER = Path(__file__).parent / "tokcom_worker.py"


class Rows(torch.utils.data.Dataset):
    """Seeded random rows; the last one is half padding."""

    def __init__(self, count: int = 24, length: int = 16):
        self.ids = torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = torch.ones_like(self.ids[index])
        return {"input_ids": self.ids[index], "attention_mask": mask}


def model(noise: bool = False) -> TokComModel:
    torch.manual_seed(0)
    extra = {"latent_noise": 0.5, "token_dropout": 0.1} if noise else {}
    return TokComModel(
        TokComConfig(
            vae={"vocab_size": 51, "latent_size": 16, "chunk_projection": "all", "fixed_norm": True, **extra, **SHAPE},
            denoiser={"self_conditioning": True, **SHAPE},
            standardize_latents=True, noise_std=1.0, mse_weight=1.0, clean_prefix=True, eos_token_id=0,
        )
    )  # fmt: skip


def joint_model(**flow) -> TokComModel:
    """Tables, head and denoiser trained together; nothing else in the VAE."""
    torch.manual_seed(0)
    vae = {"vocab_size": 51, "latent_size": 32, "encoder": "embedding", "nearest_decoder": True, **SHAPE}
    values = {
        "standardize_latents": True,
        "noise_std": 1.0,
        "clean_prefix": True,
        "eos_token_id": 0,
        "train_embeddings": True,
        "noise_likelihood": True,
    }
    return TokComModel(
        TokComConfig(**{"vae": vae, "denoiser": SHAPE, "clean_latents": "posterior_mean"} | values | flow)
    )


def settings(folder, **changes) -> dict:
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "sample_every": 0,
        "remove_unused_columns": False, "use_cpu": True, "seed": 1,
    }  # fmt: skip
    return defaults | changes


def vae_trainer(folder, vae=None, **changes) -> TokComVAETrainer:
    vae = vae or model().vae
    return TokComVAETrainer(
        model=vae,
        args=TokComVAETrainingArguments(**settings(folder, **changes)),
        train_dataset=Rows(),
        eval_dataset=Rows(6),
    )


def denoiser_trainer(folder, tokcom=None, **changes) -> DenoiserTrainer:
    tokcom = tokcom or model()
    latents = encode_rows(tokcom.vae, Rows(), folder / "latents.npy")
    tokcom.fit_latents(latents.mean, latents.std)
    return DenoiserTrainer(
        model=tokcom, args=DenoiserTrainingArguments(**settings(folder, **changes)), train_dataset=latents,
        eval_dataset=latents,
    )  # fmt: skip


def test_vae_learns_and_logs_the_documented_names(tmp_path):
    trainer = vae_trainer(tmp_path, max_steps=120, learning_rate=1e-2, eval_strategy="steps", eval_steps=120)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert logs[-1]["vae/batch_loss"] < 0.5 * logs[0]["vae/batch_loss"]
    final = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    for name in ("eval_token_accuracy", "eval_chunk_accuracy", "eval_token_accuracy_sigma_0.5"):
        assert 0 <= final[name] <= 1


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_denoiser_trains_only_the_denoiser_and_logs_its_losses(tmp_path, attention):
    tokcom = model()
    tokcom.config.denoiser.attention = attention
    before = {name: value.clone() for name, value in tokcom.vae.state_dict().items()}
    start = tokcom.denoiser.output_proj.weight.clone()
    trainer = denoiser_trainer(tmp_path, tokcom, max_steps=30, learning_rate=1e-2)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tokcom.vae.state_dict().items())
    assert not torch.equal(tokcom.denoiser.output_proj.weight, start)
    logs = [line for line in trainer.state.log_history if "diffusion/batch_mse_loss" in line]
    assert {"diffusion/batch_ce_loss", "diffusion/batch_velocity_loss"} <= logs[0].keys()
    mean = [sum(line["loss"] for line in part) for part in (logs[:8], logs[-8:])]
    assert mean[1] < mean[0]


def test_a_batch_that_counts_nowhere_costs_nothing(tmp_path):
    trainer = denoiser_trainer(tmp_path)
    tokcom = trainer.model
    clean, ids = torch.randn(2, 4, 16), torch.randint(0, 50, (2, 16))
    predicted = clean.clone().requires_grad_(True)
    nowhere = torch.zeros(2, 4, dtype=torch.bool)
    batch = NoisedBatch(clean, torch.full((2, 4), 0.5), nowhere, ids)
    loss, parts = denoiser_loss(tokcom, DenoisedModelOutput(clean_latents=predicted), batch)
    loss.backward()
    assert loss.item() == 0 and predicted.grad.abs().sum() == 0
    assert all(torch.isfinite(value) for value in parts.values())


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
    vae = model().vae.eval()
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
    file, vae = tmp_path / "latents.npy", model().vae
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


def test_averaged_weights_follow_the_formula_and_are_used_for_evaluation(tmp_path):
    trainer = vae_trainer(tmp_path, ema_decay=0.5, ema_warmup=False, max_steps=1)
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    name = "encoder.layers.0.mlp.up_proj.weight"
    last = dict(trainer.model.named_parameters())[name].clone()
    averaged = dict(trainer.average.module.named_parameters())[name]
    # The first update copies, as torch's AveragedModel documents.
    torch.testing.assert_close(averaged, last)
    trainer = vae_trainer(tmp_path / "two", ema_decay=0.5, ema_warmup=False, max_steps=2, learning_rate=0.1)
    seen = []
    trainer.add_callback(_Recorder(seen, name))
    trainer.train()
    averaged = dict(trainer.average.module.named_parameters())[name]
    torch.testing.assert_close(averaged, 0.5 * seen[0] + 0.5 * seen[1])
    with trainer.averaged_weights():
        inside = dict(trainer.model.named_parameters())[name].clone()
    torch.testing.assert_close(inside, 0.5 * seen[0] + 0.5 * seen[1])
    assert torch.equal(dict(trainer.model.named_parameters())[name], seen[1])
    assert not torch.equal(start[name], last)


class _Recorder(TrainerCallback):
    def __init__(self, seen, name):
        self.seen, self.name = seen, name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(dict(model.named_parameters())[self.name].detach().clone())


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    trainer = vae_trainer(tmp_path, save_strategy="steps", save_steps=2)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.embed_tokens.weight.data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"at step 4.*checkpoint-2"):
        trainer.train()


@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_stop_and_resume_ends_at_the_same_weights(tmp_path, stage):
    build = vae_trainer if stage == "vae" else denoiser_trainer
    noisy = {"save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9}
    first = build(tmp_path / "whole", *([model(True).vae] if stage == "vae" else []), **noisy)
    first.train()
    second = build(tmp_path / "whole", *([model(True).vae] if stage == "vae" else []), **noisy)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert second.state.global_step == 6
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(first.average.parameters(), second.average.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_resuming_a_finished_run_changes_nothing(tmp_path, stage):
    build = vae_trainer if stage == "vae" else denoiser_trainer
    first = build(tmp_path, save_strategy="steps", save_steps=6, ema_decay=0.9)
    first.train()
    second = build(tmp_path, save_strategy="steps", save_steps=6, ema_decay=0.9)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    vae_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{ tru")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_the_best_model_is_kept_and_training_stops_early(tmp_path):
    trainer = vae_trainer(
        tmp_path, max_steps=40, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        early_stopping_patience=1, learning_rate=3.0, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.global_step < 40
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_a_full_output_folder_needs_a_flag(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty; add --resume"):
        check_output_dir(tmp_path)
    with pytest.raises(NotADirectoryError):
        check_output_dir(tmp_path / "file")
    (tmp_path / "checkpoint-3").mkdir()
    check_output_dir(tmp_path, overwrite=True)
    assert not (tmp_path / "checkpoint-3").exists() and (tmp_path / "file").exists()


def run_worker(folder: Path, stage: str, *arguments: str, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, str(WORKER), str(folder), stage, *arguments], env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "denoiser", "embeddings"])
def test_two_ranks_match_one_process_with_the_same_global_batch(tmp_path, stage):
    one = run_worker(tmp_path / "one", stage, "--batch", "8")
    two = run_worker(tmp_path / "two", stage, "--batch", "4", "--world", "2", processes=2)
    assert one.wait(240) == 0 and two.wait(240) == 0
    assert json.loads((tmp_path / "two" / "world.json").read_text())["world_size"] == 2
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "denoiser", "embeddings"])
def test_kill_minus_nine_and_resume_end_at_the_same_weights(tmp_path, stage):
    assert run_worker(tmp_path / "whole", stage, "--save_steps", "5").wait(240) == 0
    killed = run_worker(tmp_path / "cut", stage, "--save_steps", "5", "--slow")
    while last_complete_checkpoint(tmp_path / "cut") is None:
        assert killed.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert run_worker(tmp_path / "cut", stage, "--save_steps", "5", "--resume").wait(240) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_memory_is_pinned_only_for_an_accelerator(tmp_path, recwarn):
    trainer = vae_trainer(tmp_path, max_steps=1, use_cpu=False)
    assert trainer.args.dataloader_pin_memory == torch.accelerator.is_available()
    trainer.train()
    assert not [str(warning.message) for warning in recwarn if "pin_memory" in str(warning.message)]
