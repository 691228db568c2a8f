"""recipes/train_tokcom.py end to end at toy size, its resume, its errors, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "train_tokcom.py"
TINY = [
    "--vae.hidden_size", "32", "--vae.intermediate_size", "64", "--vae.latent_size", "16", "--denoiser.hidden_size", "32",
    "--denoiser.intermediate_size", "64", "--denoiser.num_hidden_layers", "1", "--run.length", "32",
    "--run.tokenizer_vocab_size", "300", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2",
    "--per_device_train_batch_size", "2", "--metric_rows", "2", "--sample_chunks", "4", "--sample_steps", "2",
    "--sample_every", "0", "--use_cpu", "true",
]  # fmt: skip


def run(*arguments: str, code: str | None = None, launch: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if launch:
        command += ["-m", "accelerate.commands.launch"]
    command += ["-c", code] if code else [str(RECIPE), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(
        "\n\n\n".join(f"Document {i}: the quick brown fox number {i} jumps over {i * i} dogs." for i in range(80))
    )
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("run") / "model"
    result = run(*TINY, "--train_file", str(corpus), "--output_dir", str(out), "--prompt", "Document", launch=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result


@pytest.mark.slow
def test_the_recipe_prints_and_leaves_what_it_promises(trained):
    out, result = trained
    for words in ("held-out token accuracy", "chunk accuracy", "one denoising step against t", "generated from nothing",
                  "continuing 'Document'", "DenoisedModel with"):  # fmt: skip
        assert words in result.stdout, words
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["vae"]["token_accuracy_sigma_0.5"] <= 1
    assert 0 <= results["denoiser"]["denoised_accuracy_t_0.5"] <= 1
    card = (out / "README.md").read_text()
    assert f"{results['denoiser']['parameters']:,}" in card and "denoised_accuracy_t_0.5" in card
    assert (out / "tokenizer.json").is_file() and (out / "vae" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_folder_loads_in_a_fresh_process_with_and_without_the_package(trained, tmp_path):
    out, _ = trained
    body = """
import torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({out!r}{remote})
tokenizer = AutoTokenizer.from_pretrained({out!r}{remote})
ids = model.generate(num_chunks=4, num_steps=2, generator=torch.Generator().manual_seed(0))
assert model.config.vae.omni_token_id == len(tokenizer)
print(type(model).__module__.split(".")[0], ids.tolist())
"""
    inside = run(code="import tokcom_hf\n" + body.format(out=str(out), remote=""))
    assert inside.returncode == 0, inside.stderr[-2000:]
    # A finder that knows no tokcom_hf stands for a machine without the package.
    block = "import sys\nsys.modules['tokcom_hf'] = None\n"
    outside = run(code=block + body.format(out=str(out), remote=", trust_remote_code=True"))
    assert outside.returncode == 0, outside.stderr[-2000:]
    # Loading remote code may announce itself on stdout first.
    (package, ids), (remote, remote_ids) = (
        result.stdout.splitlines()[-1].split(maxsplit=1) for result in (inside, outside)
    )
    assert package == "tokcom_hf" and remote == "transformers_modules"
    assert ids == remote_ids


@pytest.mark.slow
def test_resume_skips_what_is_finished_and_a_full_folder_needs_a_flag(trained, corpus):
    out, _ = trained
    arguments = [*TINY, "--train_file", str(corpus), "--output_dir", str(out)]
    refused = run(*arguments)
    assert refused.returncode == 2 and "is not empty" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    again = run(*arguments, "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "stage 1 is finished" in again.stdout


@pytest.mark.slow
def test_an_overwritten_run_that_was_killed_does_not_go_on_with_the_one_before(trained, corpus, tmp_path):
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
    killed = run(
        code=f"""
import os, sys
sys.path.insert(0, {str(RECIPE.parent)!r})
sys.argv = ["train_tokcom.py", *{[*TINY, *other, "--overwrite"]!r}]
import train_tokcom
train_tokcom.TokComVAETrainer.training_step = lambda *arguments: os._exit(9)
train_tokcom.main()
"""
    )
    assert killed.returncode == 9, killed.stderr[-2000:]
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"run.json"}
    assert {path for path in left if not path.endswith(".py")} == set()
    assert (out / "another" / "checkpoint-9").is_dir() and (out / "vae" / "another" / "checkpoint-9").is_dir()
    marker = json.loads((out / "run.json").read_text())
    assert [stage["finished"] for stage in marker["stages"].values()] == [False, False]
    again = run(*TINY, *other, "--resume_from_checkpoint", "true", "--stage", "vae")
    assert again.returncode == 0 and "stage 1 is finished" not in again.stdout, again.stderr[-2000:]
    assert "no checkpoint in" in again.stdout and (out / "vae" / "results.json").is_file()


@pytest.mark.slow
def test_a_tokenizer_of_another_size_is_refused(trained, corpus):
    out, _ = trained
    before = sorted(path.name for path in out.rglob("*"))
    arguments = ["--train_file", str(corpus), "--output_dir", str(out), "--stage", "denoiser"]
    result = run(*TINY, *arguments, "--run.tokenizer_vocab_size", "290")
    assert result.returncode == 2 and "has 290 tokens but the model was trained with 300" in result.stderr
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
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, corpus, arguments, message):
    out = tmp_path / "out"
    given = arguments if "--train_file" in arguments else ["--train_file", str(corpus), *arguments]
    result = run(*TINY, *given, "--output_dir", str(out))
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()


def test_empty_and_too_short_text(tmp_path):
    for name, text, message in (("empty", "  \n", "corpus is empty"), ("short", "a", "shorter than a chunk")):
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        result = run(*TINY, "--train_file", str(file), "--output_dir", str(tmp_path / "out"))
        assert result.returncode == 2 and message in result.stderr, result.stderr[-500:]
        assert not (tmp_path / "out").exists()
