"""What a TokCom run keeps: exact resume of every stage, averaged weights, whole checkpoints, the best model."""

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers.tokcom_runs import STAGES, losses, vae_trainer
from tokcom_hf.trainers.base import check_output_dir, last_complete_checkpoint


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


@pytest.mark.parametrize("stage", STAGES)
def test_stop_and_resume_ends_at_the_same_losses_and_weights(tmp_path, stage):
    changes = {"save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    first = STAGES[stage](tmp_path, **changes)
    first.train()
    second = STAGES[stage](tmp_path, **changes)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 6
    assert losses(second) == losses(first) and len(set(losses(first))) == 6
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(first.average.parameters(), second.average.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_a_finished_run_changes_nothing(tmp_path, stage):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
    first = STAGES[stage](tmp_path, **changes)
    first.train()
    second = STAGES[stage](tmp_path, **changes)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2
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


def test_memory_is_pinned_only_for_an_accelerator(tmp_path, recwarn):
    trainer = vae_trainer(tmp_path, max_steps=1, use_cpu=False)
    assert trainer.args.dataloader_pin_memory == torch.accelerator.is_available()
    trainer.train()
    assert not [str(warning.message) for warning in recwarn if "pin_memory" in str(warning.message)]
