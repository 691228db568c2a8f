"""recipes/train_tokcom.py end to end at toy size, its resume, its errors, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests.helpers.recipes import load
from tokcom_hf.cli import run_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "train_tokcom.py"
TINY = [
    "--vae.hidden_size", "32", "--vae.intermediate_size", "64", "--vae.latent_size", "16", "--denoiser.hidden_size", "32",
    "--denoiser.intermediate_size", "64", "--denoiser.num_hidden_layers", "1", "--context.hidden_size", "32",
    "--context.intermediate_size", "64", "--context.num_hidden_layers", "1", "--run.length", "32",
    "--run.tokenizer_vocab_size", "300", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2",
    "--logging_steps", "2", "--per_device_train_batch_size", "2", "--metric_rows", "2", "--sample_chunks", "4",
    "--sample_steps", "2", "--sample_every", "0", "--use_cpu", "true", "--threads", "1",
]  # fmt: skip
DOCUMENTED = [
    "--config", str(ROOT / "recipes" / "configs" / "paper" / "train_tokcom.yaml"), "--vae.num_hidden_layers", "1",
    "--vae.hidden_size", "32", "--vae.num_attention_heads", "4", "--vae.intermediate_size", "64", "--denoiser.hidden_size",
    "32", "--denoiser.num_attention_heads", "4", "--denoiser.num_hidden_layers", "1", "--denoiser.intermediate_size", "64",
    "--run.length", "32", "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps",
    "--save_steps", "2", "--logging_steps", "2", "--per_device_train_batch_size", "2", "--metric_rows", "2",
    "--sample_chunks", "4", "--sample_steps", "2", "--sample_every", "0", "--use_cpu", "true", "--threads", "1",
    "--num_workers", "0", "--report_to", "none",
]  # fmt: skip


def launch(*arguments: str, code: str | None = None, accelerate: bool = False) -> subprocess.CompletedProcess:
    """The recipe, or other code, in a process of its own."""
    command = [sys.executable]
    if accelerate:
        command += ["-m", "accelerate.commands.launch"]
    command += ["-c", code] if code else [str(RECIPE), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(RECIPE.parents[1]), str(RECIPE.parent)))
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def recipe():
    return load("train_tokcom")


@pytest.fixture
def run(recipe, monkeypatch, capfd):
    """Runs the recipe's `main` in this process as `python train_tokcom.py ARGUMENTS` would."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
        capfd.readouterr()
        code = 0
        try:
            run_recipe(recipe.main)
        except SystemExit as end:
            code = end.code
        told = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, told.out, told.err)

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(
        "\n\n\n".join(f"Document {i}: the quick brown fox number {i} jumps over {i * i} dogs." for i in range(80))
    )
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus) -> tuple[Path, subprocess.CompletedProcess]:
    """All three stages."""
    out = tmp_path_factory.mktemp("run") / "model"
    arguments = ["--train_file", str(corpus), "--output_dir", str(out), "--prompt", "Document", "--stage", "all"]
    result = launch(*TINY, *arguments, accelerate=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result


@pytest.mark.slow
def test_the_recipe_prints_and_leaves_what_it_promises(trained):
    out, result = trained
    for words in ("held-out token accuracy", "chunk accuracy", "TokComModel with", "stage 1 (VAE): training loss",
                  "stage 2 (flow): training loss", "stage 3 (few steps): training loss", "nats per token", "heads alone",
                  "TokCom without noise", "shuffled chunks", "held-out text", "untrained", "generated without a prompt",
                  "continuing 'Document'"):  # fmt: skip
        assert words in result.stdout, words
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["vae"]["token_accuracy_sigma_0.5"] <= 1
    assert 0 <= results["denoiser"]["denoised_accuracy_t_0.5"] <= 1
    card = (out / "README.md").read_text()
    assert f"{results['denoiser']['parameters']:,}" in card and "denoised_accuracy_t_0.5" in card
    assert (out / "tokenizer.json").is_file() and (out / "vae" / "model.safetensors").is_file()
    # Held-out measurements alone: no seconds, no losses on training text.
    assert "| eval_next_token_loss |" in card and "first_loss" not in card and "seconds" not in card
    distilled = json.loads((out / "distilled" / "results.json").read_text())["distilled"]
    value = distilled["denoised_accuracy_t_0.5"]
    assert f"| denoised_accuracy_t_0.5 | {value:.4f} |" in (out / "distilled" / "README.md").read_text()
    for name in ("model.safetensors", "tokenizer.json", "README.md", "results.json", "samples.txt"):
        assert (out / "distilled" / name).is_file(), name


@pytest.mark.slow
def test_sizes_count_every_parameter(trained):
    out, _ = trained
    results = json.loads((out / "results.json").read_text())
    distilled = json.loads((out / "distilled" / "results.json").read_text())
    model = AutoModel.from_pretrained(out)
    # Written down by hand: each tensor of the file once, without what is no parameter.
    statistics = [f"posterior.{name}" for name in ("center", "mean", "rotation", "variance", "directions")]
    statistics += ["order.scale", "order.inverse"]
    statistics += ["latent_mean", "latent_std"]
    tensors = {name: value for name, value in model.state_dict().items() if name not in statistics}
    size = sum({value.data_ptr(): value.numel() for value in tensors.values()}.values())
    assert results["denoiser"]["parameters"] == distilled["distilled"]["parameters"] == size
    assert results["vae"]["parameters"] == AutoModel.from_pretrained(out / "vae").num_parameters() < size
    parts = (model.vae, model.denoiser, model.context, model.posterior, model.recent)
    assert size == sum(value.numel() for part in parts for value in part.parameters())


@pytest.mark.slow
def test_the_folder_loads_in_a_fresh_process_with_and_without_the_package(trained, tmp_path):
    out, _ = trained
    body = """
import torch
from transformers import AutoModel, AutoTokenizer
for folder in ({out!r}, {out!r} + "/distilled"):
    model = AutoModel.from_pretrained(folder{remote})
    tokenizer = AutoTokenizer.from_pretrained(folder{remote})
    assert model.config.vae.omni_token_id == len(tokenizer)
    steps = []
    model.denoiser.register_forward_hook(lambda *arguments: steps.append(1))
    ids = model.generate(num_chunks=4, generator=torch.Generator().manual_seed(0))
    print(type(model).__module__.split(".")[0], len(steps), ids.tolist())
"""
    inside = launch(code="import tokcom_hf\n" + body.format(out=str(out), remote=""))
    assert inside.returncode == 0, inside.stderr[-2000:]
    # A finder that knows no tokcom_hf stands for a machine without the package.
    block = "import sys\nsys.modules['tokcom_hf'] = None\n"
    outside = launch(code=block + body.format(out=str(out), remote=", trust_remote_code=True"))
    assert outside.returncode == 0, outside.stderr[-2000:]
    # Loading remote code may announce itself on stdout first.
    here, there = ([line.split(maxsplit=2) for line in told.stdout.splitlines()[-2:]] for told in (inside, outside))
    assert [line[0] for line in here] == ["tokcom_hf"] * 2 and [line[0] for line in there] == [
        "transformers_modules"
    ] * 2
    assert [line[1:] for line in here] == [line[1:] for line in there]
    # Four chunks, one after another; the distilled model takes two steps for each, and the heads take the first of them.
    whole, distilled = (int(line[1]) for line in here)
    assert distilled == 4 < whole


@pytest.mark.slow
def test_resume_skips_what_is_finished_and_a_full_folder_needs_a_flag(trained, corpus, run):
    out, _ = trained
    arguments = [*TINY, "--train_file", str(corpus), "--output_dir", str(out)]
    refused = run(*arguments)
    assert refused.returncode == 2 and "is not empty" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    again = run(*arguments, "--stage", "all", "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "stage 1 is finished" in again.stdout
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_stages_one_by_one_are_the_stages_together(trained, corpus, run, tmp_path):
    arguments = [*TINY, "--train_file", str(corpus), "--output_dir", str(tmp_path / "out"), "--prompt", "Document"]
    for stage in ("vae", "denoiser", "distill"):
        told = run(*arguments, "--stage", stage)
        assert told.returncode == 0, told.stderr[-2000:]
    for file in ("vae/model.safetensors", "model.safetensors", "distilled/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (trained[0] / file).read_bytes(), file


def test_a_stage_without_its_predecessor_names_it(corpus, run, tmp_path, trained):
    arguments = [*TINY, "--train_file", str(corpus), "--output_dir", str(tmp_path / "out")]
    for stage, missing in (("denoiser", "vae"), ("distill", "vae")):
        told = run(*arguments, "--stage", stage)
        assert told.returncode == 2 and f"goes on from what --stage {missing} trains" in told.stderr
        assert not (tmp_path / "out").exists()
    shutil.copytree(trained[0] / "vae", tmp_path / "out" / "vae")
    told = run(*arguments, "--stage", "distill")
    assert told.returncode == 2 and "goes on from what --stage denoiser trains" in told.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vae"]


def test_a_stage_refuses_options_of_the_model_that_it_takes_over(corpus, run, tmp_path, trained):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    arguments = [*TINY, "--train_file", str(corpus), "--output_dir", str(out), "--overwrite", "true"]
    before = sorted(str(path) for path in out.rglob("*"))
    for stage, option, taken in (
        ("denoiser", ("--vae.latent_noise", "0.1"), "vae"),
        ("distill", ("--flow.noise_std", "2.0"), "denoiser"),
        ("distill", ("--context.num_hidden_layers", "2"), "denoiser"),
    ):
        told = run(*arguments, *option, "--stage", stage)
        name = option[0].removeprefix("--")
        assert told.returncode == 2, told.stderr[-500:]
        assert f"takes over the model of stage '{taken}', which was trained with {name}" in told.stderr
        assert sorted(str(path) for path in out.rglob("*")) == before


@pytest.mark.slow
def test_the_documented_system_trains_both_stages_on_latents_encoded_once(trained, corpus, run, recipe, tmp_path):
    own_text = ["--train_file", str(corpus)]
    out = tmp_path / "out"
    told = run(*DOCUMENTED, *own_text, "--tokenizer", str(trained[0]), "--output_dir", str(out))
    assert told.returncode == 0, told.stderr[-2000:]
    model = AutoModel.from_pretrained(out)
    assert model.context is None and model.config.noise_std == 0.05 and model.config.cross_entropy_weight == 1.0
    rows = json.loads((out / "results.json").read_text())["rows"]
    written = out / "denoiser" / "train_latents.npy"
    assert np.load(written).shape == (rows, 32 // 4, 32)
    encode, seen = recipe.TokComVAE.encode, []
    again = [*DOCUMENTED, *own_text, "--tokenizer", str(trained[0]), "--output_dir", str(out), "--max_steps", "6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.TokComVAE, "encode", lambda self, ids: seen.append(len(ids)) or encode(self, ids))
        told = run(*again, "--resume_from_checkpoint", str(out / "denoiser" / "checkpoint-4"))
    assert told.returncode == 0, told.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    # Six steps of two rows ask for none of the training rows again: what was encoded are held-out rows for accuracies.
    assert results["denoiser"]["steps"] == 6 and sum(seen) < rows


@pytest.mark.slow
def test_bf16_goes_through_all_stages(corpus, run, tmp_path):
    arguments = [
        "--train_file",
        str(corpus),
        "--output_dir",
        str(tmp_path / "out"),
        "--stage",
        "all",
        "--bf16",
        "true",
    ]
    told = run(*TINY, *arguments)
    assert told.returncode == 0, told.stderr[-2000:]
    for file in ("vae/model.safetensors", "model.safetensors", "distilled/model.safetensors"):
        tensors = load_file(tmp_path / "out" / file).values()
        assert {value.dtype for value in tensors} == {torch.float32}, file


@pytest.mark.slow
def test_an_overwritten_run_that_was_killed_does_not_go_on_with_the_one_before(trained, corpus, tmp_path, run):
    out = tmp_path / "model"
    shutil.copytree(trained[0], out)
    for project in (out / "another", out / "vae" / "another"):
        (project / "checkpoint-9").mkdir(parents=True)
    other = ["--train_file", str(corpus), "--output_dir", str(out), "--seed", "7"]
    refused = run(*TINY, *other, "--resume_from_checkpoint", "true")
    assert refused.returncode == 2 and "run.seed 42 -> 7" in refused.stderr, refused.stderr[-2000:]
    # A mistake in the second stage is found before anything of the first run is gone.
    wrong = run(*TINY, *other, "--overwrite", "--denoiser_training.lr_scheduler_type", "no_such_schedule")
    assert wrong.returncode == 2 and (out / "vae" / "results.json").is_file(), wrong.stderr[-2000:]
    killed = launch(
        code=f"""
import os, sys
sys.argv = ["train_tokcom.py", *{[*TINY, *other, "--overwrite"]!r}]
import train_tokcom
train_tokcom.TokComVAETrainer.training_step = lambda *arguments: os._exit(9)
train_tokcom.main()
"""
    )
    assert killed.returncode == 9, killed.stderr[-2000:]
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"run.json"}
    # The log is that of the killed run alone.
    assert {path for path in left if not path.endswith(".py")} == {"vae/logs/training.log"}
    lines = (out / "vae" / "logs" / "training.log").read_text().splitlines()
    assert len(lines) == 1 and lines[0].endswith("training from step 0 to 4")
    assert (out / "another" / "checkpoint-9").is_dir() and (out / "vae" / "another" / "checkpoint-9").is_dir()
    marker = json.loads((out / "run.json").read_text())
    assert [stage["finished"] for stage in marker["stages"].values()] == [False, False]
    again = run(*TINY, *other, "--resume_from_checkpoint", "true", "--stage", "vae")
    assert again.returncode == 0 and "stage 1 is finished" not in again.stdout, again.stderr[-2000:]
    assert "no checkpoint in" in again.stdout and (out / "vae" / "results.json").is_file()


@pytest.mark.slow
def test_a_tokenizer_of_another_size_is_refused(trained, corpus, run, tmp_path):
    out, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "other")
    before = sorted(path.name for path in out.rglob("*"))
    arguments = ["--train_file", str(corpus), "--output_dir", str(out), "--tokenizer", str(tmp_path / "other")]
    for stage in ("denoiser", "distill"):
        result = run(*TINY, *arguments, "--stage", stage)
        assert result.returncode == 2 and "has 301 tokens but the model was trained with 300" in result.stderr
    assert sorted(path.name for path in out.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "nowhere.txt"], "does not exist"),
        (["--vae.chunk_size", "5"], "multiple of chunk_size=5"),
        (["--tokenizer", "no/such-tokenizer"], "Tokenizer 'no/such-tokenizer' cannot be loaded"),
        (["--learning_rat", "3"], "Did you mean"),
        (["--max_steps", "many"], "expected int"),
        (["--stage", "three"], "--stage must be"),
        (["--config", "no.yaml"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, corpus, run, arguments, message):
    out = tmp_path / "out"
    given = arguments if "--train_file" in arguments else ["--train_file", str(corpus), *arguments]
    result = run(*TINY, *given, "--output_dir", str(out))
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()


def test_empty_and_too_short_text(tmp_path, run):
    for name, text, message in (("empty", "  \n", "corpus is empty"), ("short", "a", "shorter than a chunk")):
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        result = run(*TINY, "--train_file", str(file), "--output_dir", str(tmp_path / "out"))
        assert result.returncode == 2 and message in result.stderr, result.stderr[-500:]
        assert not (tmp_path / "out").exists()
