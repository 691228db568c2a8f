"""What a run leaves for its reader: names in wandb and TensorBoard, tables, `logs/training.log`, `best.json`."""

import json
import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.integration_utils import rewrite_logs

from tests.helpers.joint_lfq_run import make_trainer as joint_trainer
from tests.helpers.pruning_run import make_trainer as pruning_trainer
from tests.helpers.tokcom_runs import denoiser_trainer, distillation_trainer, vae_trainer
from tokcom_hf import (
    VQGAN,
    VQGANConfig,
    VQGANDiscriminator,
    VQGANDiscriminatorConfig,
    VQGANImageProcessor,
    VQGANTrainer,
    VQGANTrainingArguments,
)
from tokcom_hf.cli import parse_recipe
from tokcom_hf.data.images import ProceduralImages
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.trainers.base import CompressionTrainingArguments
from tokcom_hf.trainers.trackers import BestModel, TrackerName, log_table, tracker_names

RECIPES = Path(__file__).parents[2] / "recipes"
EVERY_TWO = {
    "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
}  # fmt: skip


def vqgan_trainer(folder, **changes) -> VQGANTrainer:
    torch.manual_seed(0)
    config = {
        "image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "channel_multipliers": [1, 2],
        "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1, "mid_attention": False, "codebook_init": "kmeans",
    }  # fmt: skip
    settings = {
        "per_device_train_batch_size": 4, "perceptual": "random", "init_images": 16, "num_pictures": 0, "use_cpu": True,
        "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    processor = VQGANImageProcessor(16, size_divisor=4)
    return VQGANTrainer(
        VQGAN(VQGANConfig(**config)),
        VQGANTrainingArguments(str(folder), **settings | changes),
        VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=1)),
        train_dataset=ProceduralImages(16, processor),
        eval_dataset=ProceduralImages(6, processor, first=1000),
    )


TRAINERS = {
    "vae": vae_trainer, "diffusion": denoiser_trainer, "distillation": distillation_trainer, "vqgan": vqgan_trainer,
    "token_pruning": pruning_trainer, "joint_lfq": joint_trainer,
}  # fmt: skip


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """Both stages of TokCom in one offline run, as the recipe trains them, read back from wandb's own file."""
    wandb = pytest.importorskip("wandb")
    from tests.helpers.wandb_file import read_run

    folder = tmp_path_factory.mktemp("wandb")
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "WANDB_DISABLE_CODE": "true",
    }
    before = {name: os.environ.get(name) for name in [*settings, "WANDB_PROJECT"]}
    os.environ.update(settings | {"WANDB_PROJECT": "of the environment"})
    try:
        tracked = {"report_to": ["wandb"], "wandb_project": "TokCom-v5.2", "run_name": "two stages"}
        tracked |= {"sample_every": 0.5, "num_samples": 2}
        vae_trainer(folder / "vae", **EVERY_TWO | tracked).train()
        denoiser_trainer(folder / "denoiser", sample_steps=2, **EVERY_TWO | tracked).train()
        assert os.environ["WANDB_PROJECT"] == "of the environment"
        wandb.finish()
        # `finish` only asks wandb's service to close the run's file; `teardown` waits until the service has ended.
        wandb.teardown()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return read_run(folder)


def test_wandb_project_and_run_name_come_from_the_arguments(wandb_run):
    assert wandb_run["project"] == "TokCom-v5.2"
    assert wandb_run["name"] == "two stages"


def test_wandb_names_are_the_documented_ones(wandb_run):
    names = {name for row in wandb_run["rows"] for name in row}
    assert {"vae/batch_loss", "diffusion/batch_ce_loss", "diffusion/batch_mse_loss"} <= names
    # Epoch level: training and held-out loss, learning rate, the best held-out loss so far.
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/best_loss"} <= names
    by_epoch = ("train_loss", "val_loss", "best_val_loss", "learning_rate")
    assert {f"{stage}/{name}" for stage in ("vae", "diffusion") for name in by_epoch} <= names
    assert not [name for name in names if name.count("/") > 1 or "eval_" in name]


def test_wandb_values_are_the_trainers_own(wandb_run):
    losses = [row["vae/batch_loss"] for row in wandb_run["rows"] if "vae/batch_loss" in row]
    assert len(losses) == 4 and all(loss > 1 for loss in losses)
    best = [row["eval/best_loss"] for row in wandb_run["rows"] if "eval/best_loss" in row]
    held_out = [row["eval/loss"] for row in wandb_run["rows"] if "eval/loss" in row]
    assert best[:2] == [held_out[0], min(held_out[:2])]


def test_the_three_sample_tables_reach_wandb_as_tables(wandb_run):
    tables = [
        (name.removesuffix("._type"), row) for row in wandb_run["rows"] for name in row if row[name] == "table-file"
    ]
    assert [name for name, _ in tables] == ["vae/reconstructions", "diffusion/samples", "diffusion/denoising"]
    assert [row["train/global_step"] for _, row in tables] == [3, 3, 3]
    assert [row[f"{name}.nrows"] for name, row in tables] == [2, 2, 2]
    assert [row[f"{name}.ncols"] for name, row in tables] == [3, 1, 3]


@pytest.mark.parametrize(
    "recipe", ["train_tokcom", "train_ar_baseline", "train_vqgan", "train_token_pruning", "train_joint_lfq"]
)
def test_every_training_recipe_takes_tracker_project_and_run_name(recipe):
    sections = runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="recipe")["SECTIONS"]
    argv = ["--report_to", "wandb", "tensorboard", "--wandb_project", "mine", "--run_name", "first"]
    values = parse_recipe("Doc.", sections, None, argv)
    stages = [name for name, section in sections.items() if issubclass(section, CompressionTrainingArguments)]
    assert stages
    for name in stages:
        wanted = {"report_to": ["wandb", "tensorboard"], "wandb_project": "mine", "run_name": "first"}
        assert values[name].items() >= wanted.items()


def scalars(folder: Path) -> dict[str, list[float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_lies_in_the_runs_logs_and_holds_the_documented_names(tmp_path):
    trainer = pruning_trainer(tmp_path, report_to="tensorboard", max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.train()
    found = scalars(tmp_path / "logs" / "tensorboard")
    assert {"token_merger/merge_sparsity_loss", "layer_pruners/adv_loss", "layer_pruners/task_loss"} <= set(found)
    assert {"discriminator/real_loss", "discriminator/fake_loss"} <= set(found)
    assert len(found["layer_pruners/task_loss"]) == 2
    assert not [name for name in found if name.count("/") > 1]


def test_names_of_the_vqgan_have_one_prefix(tmp_path):
    trainer = vqgan_trainer(tmp_path, report_to="tensorboard", **EVERY_TWO | {"max_steps": 2, "save_strategy": "no"})
    trainer.train()
    found = scalars(tmp_path / "logs" / "tensorboard")
    assert not [name for name in found if name.count("/") != 1 or "eval_" in name]
    assert {"train/loss", "eval/loss", "eval/psnr"} <= set(found)


def test_tables_reach_tensorboard_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: True,
        state=SimpleNamespace(global_step=3),
        callback_handler=SimpleNamespace(callbacks=[SimpleNamespace(tb_writer=writer)]),
    )
    log_table(trainer, "vae/reconstructions", {"text": ["one\ntwo"], "count": [2]})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("vae/reconstructions/text_summary")
    assert (
        event.step == 3 and event.tensor_proto.string_val[0].decode() == "| text | count |\n|---|---|\n| one two | 2 |"
    )


@pytest.mark.minima
def test_transformers_leaves_names_with_a_slash_alone():
    logs = tracker_names({"vae/batch_loss": 1.0, "loss": 2.0, "eval_loss": 3.0, "train/psnr": 4.0})
    rewritten = rewrite_logs(logs)
    assert rewritten == {"vae/batch_loss": 1.0, "train/loss": 2.0, "eval/loss": 3.0, "train/psnr": 4.0}
    assert all(type(name) is str for name in rewritten)
    assert json.loads(json.dumps(logs)) == logs and TrackerName("a/b") == "a/b" and {"a/b": 1}[TrackerName("a/b")] == 1


@pytest.mark.parametrize("stage", TRAINERS)
def test_every_trainer_records_its_best_model(stage, tmp_path):
    trainer = TRAINERS[stage](tmp_path, **EVERY_TWO | {"report_to": "none", "metric_for_best_model": "loss"})
    trainer.train()
    best = json.loads((tmp_path / "best.json").read_text())
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    lowest = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert best == {
        "stage": stage, "epoch": lowest["epoch"], "step": lowest["step"], "metric": "loss", "value": lowest["eval_loss"],
        "checkpoint": f"checkpoint-{lowest['step']}",
    }  # fmt: skip
    assert (tmp_path / best["checkpoint"] / "model.safetensors").is_file()
    assert trainer.state.best_model_checkpoint == str(tmp_path / best["checkpoint"])
    assert [entry["eval_best_loss"] for entry in evaluations][-1] == lowest["eval_loss"]


def evaluated(callback: BestModel, step: int, metrics: dict, args, save: bool = True) -> None:
    state = SimpleNamespace(global_step=step, epoch=step / 4, is_world_process_zero=True)
    callback.on_evaluate(args, state, None, metrics=metrics)
    if save:
        (callback.folder / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    callback.on_save(args, state, None)


@pytest.mark.minima
def test_the_best_record_keeps_to_the_metric_and_to_what_is_still_saved(tmp_path):
    args = SimpleNamespace(metric_for_best_model="eval_psnr", greater_is_better=True)
    callback = BestModel(tmp_path, "vqgan")
    start = SimpleNamespace(global_step=0)
    evaluated(callback, 1, {"eval_psnr": 50.0}, args)  # nothing is being trained yet
    assert not (tmp_path / "best.json").exists()
    callback.on_train_begin(args, start, None)
    evaluated(callback, 2, {"eval_psnr": 20.0, "eval_loss": 1.0}, args)
    evaluated(callback, 4, {"eval_psnr": 19.0, "eval_loss": 0.5}, args)
    evaluated(callback, 6, {"eval_psnr": float("nan")}, args)
    record = {"stage": "vqgan", "epoch": 0.5, "step": 2, "metric": "psnr", "value": 20.0}
    assert json.loads((tmp_path / "best.json").read_text()) == record | {"checkpoint": "checkpoint-2"}
    (tmp_path / "checkpoint-2").rmdir()
    evaluated(callback, 8, {"eval_psnr": 18.0}, args)
    assert json.loads((tmp_path / "best.json").read_text()) == record | {"checkpoint": None}

    resumed = BestModel(tmp_path, "vqgan")
    resumed.on_train_begin(args, SimpleNamespace(global_step=4), None)
    evaluated(resumed, 6, {"eval_psnr": 19.5}, args)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    resumed.on_train_begin(args, SimpleNamespace(global_step=1), None)  # from before the best one
    evaluated(resumed, 3, {"eval_psnr": 19.5}, args)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3


def test_the_runs_log_lies_in_its_folder_and_goes_on_with_it(tmp_path):
    settings = EVERY_TWO | {"eval_strategy": "no"}
    vae_trainer(tmp_path, **settings).train()
    lines = (tmp_path / "logs" / "training.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] ", line) for line in lines)
    texts = [line.partition("[INFO] ")[2] for line in lines]
    assert texts[0] == "training from step 0 to 4" and texts[-1] == "training ended at step 4"
    assert [text for text in texts if text.startswith("saved")] == ["saved checkpoint-2", "saved checkpoint-4"]
    assert len([text for text in texts if re.match(r"\[Step \d\] .*vae/batch_loss: \d", text)]) == 4
    vae_trainer(tmp_path, **settings | {"max_steps": 6}).train(resume_from_checkpoint=True)
    later = (tmp_path / "logs" / "training.log").read_text().splitlines()
    assert later[: len(lines)] == lines and later[len(lines)].endswith("training from step 4 to 6")


def test_overwriting_a_run_removes_its_logs_and_its_best_record(tmp_path):
    arguments = RunFolderArguments(output_dir=str(tmp_path))
    RunFolder(arguments, "train_x").start({"": {}})
    files = ["best.json", "logs/training.log", "logs/tensorboard/events.out.tfevents.1.host.2.0"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    RunFolder(RunFolderArguments(output_dir=str(tmp_path), overwrite=True), "train_x").start({"": {}})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}
