"""A signal ends training with a checkpoint of its step; the resumed run ends where an undisturbed one does."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import tokcom_hf.stopping as stopping
from tests.helpers.llama_rows import Rows
from tokcom_hf.cli import run_recipe
from tokcom_hf.stopping import Stopped, stop_on_signals
from tokcom_hf.trainers.base import CompressionTrainer, CompressionTrainingArguments

CONFIG = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "attention_dropout": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def listening():
    """A shell starts its background jobs with SIGINT ignored, which a run would respect."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SendAt(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def trainer(folder, *callbacks, **changes):
    torch.manual_seed(0)
    settings = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", "learning_rate": 1e-2, "ema_decay": 0.5,
    }  # fmt: skip
    args = CompressionTrainingArguments(str(folder), **settings | changes)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    return CompressionTrainer(model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks))


def evaluations(trainer):
    return [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


@pytest.mark.parametrize(
    ("event", "step", "stopped_at"),
    [
        ("on_step_begin", 0, 1),
        ("on_step_begin", 1, 2),  # an evaluation is due at the step that ends
        ("on_prediction_step", 2, 2),  # the evaluation is cut short
        ("on_save", 3, 3),
        ("on_step_end", 4, 4),
        ("on_prediction_step", 5, 5),  # of the last step: only the evaluation is left to do
    ],
)
def test_the_resumed_run_ends_with_the_same_weights_and_evaluations(tmp_path, whole, event, step, stopped_at):
    with pytest.raises(Stopped) as told, stop_on_signals():
        trainer(tmp_path, SendAt(event, step)).train()
    assert told.value.code == 143 and told.value.checkpoint.endswith(f"checkpoint-{stopped_at}")
    assert f"after step {stopped_at}" in str(told.value) and "--resume" in str(told.value)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert evaluations(resumed) == evaluations(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_signal_behind_the_last_step_is_followed_by_a_checkpoint_also_without_a_save_strategy(tmp_path, whole):
    with pytest.raises(Stopped) as told, stop_on_signals():
        trainer(tmp_path, SendAt("on_prediction_step", 4), SendAt("on_log", 5), save_strategy="no").train()
    assert told.value.checkpoint.endswith("checkpoint-4")
    with pytest.raises(Stopped) as told, stop_on_signals():
        trainer(tmp_path, SendAt("on_log", 5), save_strategy="no").train(resume_from_checkpoint=True)
    assert told.value.checkpoint.endswith("checkpoint-5") and Path(told.value.checkpoint).is_dir()
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_signal_between_two_epochs_leaves_their_evaluation_to_the_resumed_run(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    # Four steps make an epoch.
    with pytest.raises(Stopped) as told, stop_on_signals():
        trainer(tmp_path / "cut", SendAt("on_step_begin", 3, signal.SIGINT), **settings).train()
    assert told.value.code == 130 and told.value.checkpoint.endswith("checkpoint-4")
    resumed = trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert evaluations(resumed) == evaluations(plain)


def test_an_evaluation_that_is_made_up_may_name_the_best_checkpoint(tmp_path):
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "ema_decay": 0.0}
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    assert plain.state.best_global_step == 4  # what the signal cuts short is the best evaluation
    with pytest.raises(Stopped), stop_on_signals():
        trainer(tmp_path / "cut", SendAt("on_prediction_step", 4), **settings).train()
    resumed = trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-4"
    records = [json.loads((tmp_path / name / "best.json").read_text()) for name in ("plain", "cut")]
    assert records[0] == records[1] and records[0]["checkpoint"] == "checkpoint-4"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_outside_training_a_signal_ends_the_run_at_once(tmp_path):
    with pytest.raises(Stopped) as told, stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the signal came too late")
    assert told.value.code == 130 and told.value.checkpoint is None


def test_a_stage_that_was_stopped_does_not_go_on_to_the_next(tmp_path, capsys):
    reached = []

    def main():
        trainer(tmp_path, SendAt("on_step_begin", 1)).train()
        reached.append("stage 2")

    with pytest.raises(SystemExit) as end:
        run_recipe(main)
    assert end.value.code == 143 and reached == []
    assert "the run is unfinished" in capsys.readouterr().err


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) is not before
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_forked_worker_is_ended_without_ending_its_parent():
    with stop_on_signals():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        # SIGINT of a terminal reaches all; the parent alone decides.
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(2 * stopping.WATCH_SECONDS)
        assert stopping._request.signum is None


def test_a_second_signal_and_a_wait_that_no_signal_reaches_end_at_once(tmp_path):
    code = """
        import os, signal, sys, threading, time
        import tokcom_hf.stopping as stopping
        stopping.REPEAT_SECONDS, stopping.GRACE_SECONDS = 0.1, 0.5
        with stopping.stop_on_signals():
            if sys.argv[1] == "second":
                stopping.training_begins()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                # A rank that waits for another does not run Python's handlers.
                lock = threading.Lock()
                lock.acquire()
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                while True:
                    try:
                        lock.acquire()
                    except BaseException:
                        pass
        time.sleep(60)
    """
    for how in ("second", "wait"):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), how], timeout=60)
        assert done.returncode == 143 and time.monotonic() - began < 50, how


def test_checkpoints_of_transformers_that_pass_for_a_finished_training_are_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint"):
        CompressionTrainingArguments(str(tmp_path), enable_jit_checkpoint=True)


def test_a_repeated_signal_counts_only_after_a_while():
    request = stopping._Request()
    assert not request.receive(signal.SIGINT) and not request.receive(signal.SIGINT)
    request.since -= 2 * stopping.REPEAT_SECONDS
    assert request.receive(signal.SIGTERM) and request.signum == signal.SIGINT
