"""Two-player training: schedules, accumulation, checkpoints, ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.vqgan_run import state, trainer
from tokcom_hf.trainers.vqgan import VQGANTrainingArguments
from tokcom_hf.trainers.vqgan_adversary import LeCAM, adaptive_weight, discriminator_loss, generator_loss

ROOT = Path(__file__).resolve().parents[2]


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_losses_and_their_gradients():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake, "hinge") == pytest.approx(0.5 * (0.5 + 0.75))
    assert generator_loss(fake, "hinge") == pytest.approx(0.75)
    assert discriminator_loss(real * 9, fake * 9 - 9, "non_saturating") < discriminator_loss(
        fake, real, "non_saturating"
    )
    weight = torch.ones(1, requires_grad=True)
    assert adaptive_weight((3 * weight).sum(), (2 * weight).sum(), weight, 10.0) == pytest.approx(1.5, abs=1e-4)
    assert adaptive_weight((3 * weight).sum(), (2 * weight).sum(), weight, 1.0) == 1.0
    lecam = LeCAM()
    lecam.update(1.0, -1.0)
    assert lecam.penalty(torch.tensor([1.0]), torch.tensor([-1.0])) == pytest.approx(8.0)


def test_both_players_train_and_the_log_tells_all(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=1)
    before = state(run.discriminator), state(run.model)
    run.train()
    assert any(not torch.equal(before[0][name], tensor) for name, tensor in run.discriminator.state_dict().items())
    assert any(not torch.equal(before[1][name], tensor) for name, tensor in run.model.state_dict().items())
    assert int(run.model.quantizer.num_updates) == 4
    logs = {name for row in run.state.log_history for name in row}
    wanted = {"train/perceptual_loss", "train/discriminator_loss", "train/adversarial_weight", "train/commitment_loss"}
    wanted |= {"codebook/batch_utilization", "codebook/batch_utilization_ceiling", "codebook/window_utilization"}
    wanted |= {"codebook/cumulative_normalized_entropy", "eval_psnr", "eval_utilization", "eval_normalized_entropy"}
    assert wanted <= logs
    first = next(row for row in run.state.log_history if row["step"] == 1)
    assert "train/adversarial_loss" not in first  # starts at a quarter of four steps
    assert (tmp_path / "pictures" / "step-4-reconstructions.png").is_file()


def test_schedules(tmp_path):
    run = trainer(
        tmp_path,
        {"temperature": 2.0},
        autoencoder_steps=2,
        temperature_anneal=0.5,
        commitment_warmup_epochs=4.0,
        adversarial_warmup=0.5,
    )
    run.state.max_steps = 100
    seen = []
    for step, epoch in ((0, 0.0), (25, 1.0), (60, 8.0)):
        run.state.global_step, run.state.epoch = step, epoch
        run._set_schedules(run.model)
        seen.append((run.model.quantizer.enabled, run.model.quantizer.temperature, run.model.commitment_scale))
        seen[-1] += (round(run.adversarial_scale(), 3),)
    assert seen == [(False, 2.0, 0.0, 0.0), (True, 1.0, 0.25, 0.008), (True, 0.0, 1.0, 0.288)]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["ema", "lfq"])
def test_accumulation_equals_the_large_batch(tmp_path, quantizer):
    # Sampling order differs with the batch size only through the loader; one pass over 32 images holds both equal.
    settings = {"max_steps": 2, "train_sampling_strategy": "sequential", "adversarial_start": 0.0}
    settings |= {
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gan_regularizer": "none",
        "adaptive_weight": False,
        "optim": "sgd",
    }
    # The entropy is that of the whole batch, which no single micro-batch sees.
    model = {"quantizer": quantizer, "entropy_weight": 5.0}
    whole = trainer(tmp_path / "a", model, per_device_train_batch_size=32, **settings)
    parts = trainer(tmp_path / "b", model, per_device_train_batch_size=8, gradient_accumulation_steps=4, **settings)
    whole.train()
    parts.train()
    if quantizer == "ema":
        assert int(whole.model.quantizer.num_updates) == int(parts.model.quantizer.num_updates) == 2
    assert_close(state(whole.model), state(parts.model), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["lecam", "r1"])
def test_resume_continues_both_players_exactly(tmp_path, regularizer):
    settings = {"gan_regularizer": regularizer, "gan_loss": "non_saturating", "save_steps": 2, "ema_decay": 0.9}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(state(whole.model), state(again.model), 1e-6)
    assert_close(state(whole.discriminator), state(again.discriminator), 1e-6)
    assert_close(state(whole.average), state(again.average), 1e-6)
    assert whole.adversary.lecam.state_dict() == again.adversary.lecam.state_dict()
    assert whole.monitor.report() == again.monitor.report()


def test_a_run_that_would_never_quantize_is_refused(tmp_path):
    with pytest.raises(ValueError, match="autoencoder_steps"):
        trainer(tmp_path, autoencoder_steps=4).train()


@pytest.mark.parametrize("quantizer", ["ema", "lfq"])
@pytest.mark.parametrize("autoencoder_steps", [0, 1])
def test_a_rate_that_is_far_too_high_ends_in_words(tmp_path, quantizer, autoencoder_steps):
    run = trainer(
        tmp_path,
        {"quantizer": quantizer, "entropy_weight": 0.1},
        learning_rate=1e12,
        max_grad_norm=0.0,
        autoencoder_steps=autoencoder_steps,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        num_pictures=0,
    )
    with pytest.raises(
        FloatingPointError, match=r"became (nan|NaN|inf).* at step [23]; no checkpoint .*Lower the learning"
    ):
        run.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_bf16_trains_and_fp16_is_refused(tmp_path):
    run = trainer(tmp_path, bf16=True, max_steps=2)
    run.train()
    assert run.model.quantizer.codebook.dtype == torch.float32
    with pytest.raises(ValueError, match="bf16"):
        VQGANTrainingArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)
    with pytest.raises(ValueError, match="gan_loss"):
        VQGANTrainingArguments(output_dir=str(tmp_path), gan_loss="wgan")


TWO_RANKS = """
import sys, torch
from tests.helpers.vqgan_run import trainer, state
from tokcom_hf.cli import leave_together
run = trainer({folder!r}, {{"entropy_weight": 0.1, "dead_code_threshold": 0.5}}, max_steps=50, logging_steps=25,
              ddp_find_unused_parameters=False, per_device_train_batch_size=4, ema_decay=0.9)
quantizer, moved = run.model.quantizer, []
reset = quantizer.reset_dead_codes
quantizer.reset_dead_codes = lambda *arguments: moved.append(reset(*arguments)) or moved[-1]
run.train()
del quantizer.reset_dead_codes
torch.save({{"model": state(run.model), "discriminator": state(run.discriminator), "moved": moved}},
           {folder!r} + f"/rank{{run.args.process_index}}.pt")
del run, quantizer, reset
leave_together()
"""


@pytest.mark.slow
def test_fifty_two_rank_steps_leave_equal_codebooks(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(folder=str(tmp_path)))
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("model", "discriminator"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    assert int(first["model"]["quantizer.num_updates"]) == 50
    assert first["moved"] == second["moved"] and sum(first["moved"]) > 0


RECIPE = [
    "recipes/train_vqgan.py --image_size 32 --run.num_train 64 --run.num_eval 16 --model.base_channels 8",
    "--per_device_train_batch_size 8 --logging_steps 2 --save_steps 4 --eval_steps 4 --autoencoder_steps 2",
    "--max_steps 8 --report_to none --disable_tqdm true --init_images 32 --use_cpu true",
]


@pytest.mark.slow
def test_recipe_survives_a_kill_and_the_analysis_reads_its_model(tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, *" ".join(RECIPE).split(), "--output_dir", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    longer = [*command, "--max_steps", "400"]
    process = subprocess.Popen(longer, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (output / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "not empty" in refused.stderr and "Traceback" not in refused.stderr
    done = subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] >= 8 and 0 < results["metrics"]["utilization"] <= 1 and results["metrics"]["psnr"] > 5
    assert f"{results['metrics']['psnr']:.2f} dB" in (output / "README.md").read_text()
    assert (output / "reconstructions.png").is_file() and (output / "discriminator" / "config.json").is_file()
    assert "quantizer.codebook" in load_file(output / "model.safetensors")
    analyse = [sys.executable, "recipes/analyze_codebook.py", "--model_path", str(output), "--num_images", "16"]
    analyse += ["--output_dir", str(tmp_path / "analysis"), "--plot", "--save_details", "--interactive"]
    done = subprocess.run(
        analyse, cwd=ROOT, env=environment, capture_output=True, text=True, input="count\n3\nn\nwrong\nq\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    lines = (tmp_path / "analysis" / "codes.csv").read_text().splitlines()
    counts = [int(line.split(",")[1]) for line in lines[1:]]
    assert len(counts) == 64 and sum(counts) == summary["codes_seen"]
    assert sum(count > 0 for count in counts) == summary["active"]
