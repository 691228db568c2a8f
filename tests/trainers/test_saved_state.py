"""What trainers save and go on from: finite numbers only, whole checkpoints only, every tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from tests.helpers.llama_rows import Rows
from tokcom_hf.checkpoints import checkpoint_fault
from tokcom_hf.trainers.base import CompressionTrainer, CompressionTrainingArguments

TEXT = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


class WithSecondNetwork(CompressionTrainer):
    """Keeps a second network beside the model, as the adversarial trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = torch.nn.Linear(2, 2)

    def auxiliary_state(self):
        return {"second": self.second}


class At(TrainerCallback):
    """Does something to the model when a step is over."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def trainer(folder, cls=CompressionTrainer, model=None, seed=0, eval_dataset=None, **changes):
    torch.manual_seed(seed)
    settings = {
        "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", "learning_rate": 1e-2,
    }  # fmt: skip
    args = CompressionTrainingArguments(str(folder), **settings | changes)
    model = model or LlamaForCausalLM(LlamaConfig(**TEXT))
    return cls(model, args, train_dataset=Rows(), eval_dataset=eval_dataset)


def without_manifest(checkpoint):
    """As an older release left it: what tests change in it is then not told by its size and hash."""
    (checkpoint / "manifest.json").unlink()
    return checkpoint


def poison(model):
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")


@pytest.mark.parametrize("changes", [{}, {"stop_on_nonfinite_loss": False}, {"ema_decay": 0.5}])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, changes):
    run = trainer(tmp_path, **changes)
    run.add_callback(At(2, poison))
    told = r"hold NaN or infinity \(model\.norm\.weight\) at step 2; the last verified checkpoint is \S*checkpoint-1\."
    with pytest.raises(FloatingPointError, match=told):
        run.train()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    with pytest.raises(FloatingPointError):
        run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_a_run_does_not_end_well_with_weights_that_are_not_finite(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    run.add_callback(At(3, poison))
    with pytest.raises(FloatingPointError, match="no checkpoint had been saved yet"):
        run.train()


def test_a_second_network_counts_too(tmp_path):
    run = trainer(tmp_path, WithSecondNetwork)
    run.add_callback(At(2, lambda model: torch.nn.init.constant_(run.second.bias, float("inf"))))
    with pytest.raises(FloatingPointError, match=r"second: bias"):
        run.train()


def test_the_gradient_norm_ends_the_run_before_the_weights_are_harmed(tmp_path):
    run = trainer(tmp_path)
    weight = run.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * float("inf") if run.state.global_step == 1 else gradient)
    with pytest.raises(FloatingPointError, match=r"gradient norm became (inf|nan) at step 2.*checkpoint-1"):
        run.train()
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_the_last_good_checkpoint_of_an_older_release_has_been_looked_into(tmp_path):
    trainer(tmp_path).train()
    without_manifest(tmp_path / "checkpoint-3")
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    weights["lm_head.weight"][0] = float("nan")
    save_file(weights, tmp_path / "checkpoint-3" / "model.safetensors", metadata={"format": "pt"})
    run = trainer(tmp_path, max_steps=5)
    with pytest.raises(FloatingPointError, match=r"last verified checkpoint is \S*checkpoint-2\."):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("file", ["auxiliary.pt", "ema.safetensors"])
def test_a_missing_part_is_no_silent_restart(tmp_path, file):
    trainer(tmp_path, WithSecondNetwork, ema_decay=0.9).train()
    (tmp_path / "checkpoint-3" / file).unlink()
    again = trainer(tmp_path, WithSecondNetwork, ema_decay=0.9, max_steps=4)
    with pytest.raises(ValueError, match=rf"{file} is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = []
    again.add_callback(At(3, lambda model: seen.append(again.state.global_step)))
    again.train(resume_from_checkpoint=True)  # from checkpoint-2
    assert seen == [3]
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}" / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole"):
        trainer(tmp_path, WithSecondNetwork, ema_decay=0.9).train(resume_from_checkpoint=True)


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=1, image_seq_length=4)
    )


def test_every_tensor_of_a_converted_architecture_is_restored(tmp_path):
    def frozen(seed):
        torch.manual_seed(seed)
        model = llava()
        model.model.vision_tower.requires_grad_(False)
        return model

    first = trainer(tmp_path, model=frozen(0))
    first.train()
    again = trainer(tmp_path, model=frozen(1))
    again.train(resume_from_checkpoint=True)
    assert len(first.model.state_dict()) > 25
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    # The finished model keeps the names of the architecture's release, which other programs look for.
    first.save_model(str(tmp_path / "final"))
    final = set(load_file(tmp_path / "final" / "model.safetensors"))
    assert "language_model.lm_head.weight" in final and final != set(first.model.state_dict())

    without_manifest(tmp_path / "checkpoint-3")
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "checkpoint-3" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's \d+ tensors \(lm_head\.weight"):
        trainer(tmp_path, model=frozen(1)).train(resume_from_checkpoint=True)


def test_other_rates_act_in_a_resumed_run(tmp_path):
    trainer(tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    again = trainer(tmp_path / "new", learning_rate=3e-3, weight_decay=0.5, adam_beta2=0.5, logging_steps=1)
    again.train(resume_from_checkpoint=checkpoint)
    # Trainer decays linearly from the rate to 0 over its three steps.
    rates = [line["learning_rate"] for line in again.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([2e-3, 1e-3])
    group = again.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.9, 0.5)
    # The moments are the checkpoint's: another run than one that starts there without them.
    assert all(int(state["step"]) == 3 for state in again.optimizer.state.values())


def test_tied_weights_are_not_missing(tmp_path):
    def tied():
        return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True))

    first = trainer(tmp_path, model=tied())
    first.train()
    again = trainer(tmp_path, model=tied(), seed=5)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(first.model.lm_head.weight, again.model.model.embed_tokens.weight)


def test_seconds_of_all_parts_are_told_and_new_callbacks_join_a_resumed_run(tmp_path):
    trainer(tmp_path).train()
    file = without_manifest(tmp_path / "checkpoint-3") / "trainer_state.json"
    state = json.loads(file.read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["before"] < 100
    state["stateful_callbacks"]["Clock"]["attributes"]["before"] = 1000.0
    file.write_text(json.dumps(state))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 9, "eval_dataset": Rows()}
    again = trainer(tmp_path, max_steps=5, **evaluated)
    again.train(resume_from_checkpoint=True)
    assert 1000 < again.training_seconds < 1100
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["Clock"]["attributes"]["before"] > 1000 and "EarlyStoppingCallback" in saved


class Seen(TrainerCallback):
    """Notes which checkpoints are in the run's folder when one has been saved, and whether the newest is whole."""

    def __init__(self):
        self.folders = []

    def on_save(self, args, state, control, **kwargs):
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        assert checkpoint_fault(newest) is None
        self.folders.append(sorted(path.name for path in Path(args.output_dir).glob("*checkpoint*")))


def test_callbacks_rotation_the_best_model_and_pushes_see_checkpoints_in_their_place(tmp_path, monkeypatch):
    pushed = []

    def push(trainer, folder):
        pushed.append(Path(folder).name)
        assert checkpoint_fault(folder) is None

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    run = trainer(
        tmp_path, max_steps=5, save_total_limit=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="step", eval_dataset=Rows(), ema_decay=0.5,
    )  # fmt: skip
    # The second evaluation is the best one.
    monkeypatch.setattr(run, "_evaluate", lambda *args: {"eval_step": float(run.state.global_step == 2)})
    run.args.greater_is_better, run.args.push_to_hub = True, True
    monkeypatch.setattr(run, "_finish_current_push", lambda: None)
    seen = Seen()
    run.add_callback(seen)
    run.train()
    assert pushed == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)]
    best = "checkpoint-2"
    assert seen.folders == [["checkpoint-1"], ["checkpoint-1", best], [best, "checkpoint-3"], [best, "checkpoint-4"],
                            [best, "checkpoint-5"]]  # fmt: skip
    for name in (best, "checkpoint-5"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / best)
    weights = load_file(tmp_path / best / "model.safetensors")
    assert torch.equal(run.model.lm_head.weight, weights["lm_head.weight"])


def test_a_best_checkpoint_that_was_changed_is_not_loaded(tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=Rows(),
        learning_rate=0.0,
    )
    run.add_callback(At(3, lambda model: (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")))
    with pytest.raises(ValueError, match=r"checkpoint-1' cannot be loaded: model\.safetensors has 0 bytes"):
        run.train()


def test_a_final_save_replaces_another_model_and_leaves_the_user_s_files(tmp_path):
    run = trainer(tmp_path / "run", max_steps=1, save_strategy="no")
    run.train()
    place = tmp_path / "final"
    place.mkdir()
    for name in (
        "notes.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "my_model.safetensors",
    ):
        (place / name).write_text("before")
    run.save_model(str(place))
    names = {path.name for path in place.iterdir()}
    assert {"notes.txt", "my_model.safetensors", "model.safetensors", "config.json"} <= names
    assert not any(name.startswith((".unfinished", "model-", "model.safetensors.index")) for name in names)
    again = LlamaForCausalLM.from_pretrained(place)
    assert torch.equal(again.lm_head.weight, run.model.lm_head.weight)
