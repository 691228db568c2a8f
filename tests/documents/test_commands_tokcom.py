"""TokCom's commands and its Python snippet, as they are documented: parsed, and run to their end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.recipes import load
from tokcom_hf import DenoisedModel, TokComConfig, TokComModel
from tokcom_hf.cli import parse_recipe
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.documented_names import INFER_TOKCOM, TRAIN_TOKCOM
from tokcom_hf.tokcom_checkpoint import load_checkpoint_file

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "configs" / "paper" / "train_tokcom.yaml"
CHECKPOINT = "checkpoints/best_diffusion.pt"
TEXT = "你要重建的文本内容"
COMMANDS = {
    "generate": ["--checkpoint", CHECKPOINT, "--mode", "generate", "--num_steps", "50", "--batch_size", "2"],
    "reconstruct": ["--checkpoint", CHECKPOINT, "--mode", "reconstruct", "--input_text", TEXT],
    "denoise_reconstruct": [
        "--checkpoint", CHECKPOINT, "--mode", "denoise_reconstruct", "--input_text", TEXT, "--noise_level", "0.5",
        "--num_steps", "50",
    ],
    "encode": [
        "--checkpoint", CHECKPOINT, "--mode", "encode", "--input_text", "你要编码的文本内容", "--output_file", "latents.pt",
    ],
    "conditional": [
        "--checkpoint", CHECKPOINT, "--mode", "conditional", "--prompt", "The family of four was ",
        "--num_generate_chunks", "64", "--num_steps", "50",
    ],
}  # fmt: skip
SNIPPET = """
from tokcom_hf import TokComVAE, DenoisedModel, ModelArgs
from tokcom_hf.tokcom_inference import (
    load_checkpoint,
    generate,
    reconstruct,
    denoise_reconstruct,
    encode,
    decode
)

vae_model, denoised_model, model_args, config = load_checkpoint(
    "checkpoints/best_diffusion.pt",
    device="cpu"
)

token_ids = generate(
    vae_model, denoised_model,
    num_chunks=256,
    chunk_size=4,
    hidden_size=model_args.hidden_size,
    noise_std=config['noise_std'],
    num_steps=50,
    batch_size=1,
    device="cpu"
)

from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(config['tokenizer_path'])
text = tokenizer.decode(token_ids[0], skip_special_tokens=True)
print(text)
"""
# A model and runs small enough for a test; all else is the configuration's.
SMALL = [
    "--vae.hidden_size", "32", "--vae.num_attention_heads", "4", "--vae.num_hidden_layers", "1", "--vae.intermediate_size",
    "48", "--denoiser.hidden_size", "32", "--denoiser.num_attention_heads", "4", "--denoiser.num_hidden_layers", "1",
    "--denoiser.intermediate_size", "48", "--sample_chunks", "4", "--metric_rows", "4", "--threads", "1", "--use_cpu",
    "true", "--report_to", "none", "--disable_tqdm", "true", "--train_file", "text.txt",
]  # fmt: skip
SHORTER = [
    "--max_length", "64", "--batch_size", "4", "--num_workers", "0", "--tokenizer_path", "tokenizer", "--vae_epochs", "2",
    "--diffusion_epochs", "2", "--num_sample_steps", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def training():
    return load("train_tokcom")


@pytest.fixture(scope="module")
def inference():
    return load("infer_tokcom")


@pytest.fixture(scope="module")
def place(training, tmp_path_factory) -> Path:
    """A folder with text, a tokenizer, and what the documented training leaves in `checkpoints`."""
    folder = tmp_path_factory.mktemp("tokcom")
    texts = [f"Number {i}: the family of four was seen {i * i} times by {i} foxes." for i in range(80)]
    (folder / "text.txt").write_text("\n\n\n".join(texts))
    train_tokenizer(texts, 300).save_pretrained(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        training.main(["--config", str(PAPER), *SMALL, *SHORTER])
    return folder


@pytest.fixture
def inside(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def passes(monkeypatch) -> list[tuple[torch.Tensor, float]]:
    """What the denoiser was given in each pass: noisy latents, and the time."""
    seen, forward = [], DenoisedModel.forward

    def recorded(self, latents, timesteps, *given, **more):
        seen.append((latents.detach().clone(), timesteps.flatten()[0].item()))
        return forward(self, latents, timesteps, *given, **more)

    monkeypatch.setattr(DenoisedModel, "forward", recorded)
    return seen


@pytest.fixture
def run(inside, inference, capsys):
    """Runs an inference command in `place` and returns what it printed."""

    def run(*words: str) -> str:
        capsys.readouterr()
        inference.main(list(words))
        return capsys.readouterr().out

    return run


# ------------------------------------------------------------------------------------------------------------- parsed
DOCUMENTED_DEFAULTS = {
    "mode": "generate", "text": None, "prompt": None, "num_chunks": 256, "num_generate_chunks": 64, "noise_level": 0.5,
    "batch_size": 1, "device": "auto", "output_file": None,
}  # fmt: skip


@pytest.mark.parametrize("mode", COMMANDS)
def test_every_flag_of_a_command_sets_what_it_names(inference, mode):
    words = COMMANDS[mode]
    values = parse_recipe("", {"run": inference.InferenceArguments}, None, words, INFER_TOKCOM)["run"]
    typed = dict(zip(words[::2], words[1::2], strict=True))
    ours = {"--checkpoint": "model", "--input_text": "text"}
    expected = {ours.get(flag, flag.removeprefix("--")): value for flag, value in typed.items()}
    assert {name: str(value) for name, value in values.items()} == expected
    run = inference.InferenceArguments(**values)
    inference.check_arguments(run, values)
    untouched = {name: value for name, value in DOCUMENTED_DEFAULTS.items() if name not in values}
    assert {name: getattr(run, name) for name in untouched} == untouched


def test_the_documented_arguments_have_the_documented_defaults(inference):
    run = inference.InferenceArguments()
    assert {name: getattr(run, name) for name in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS
    # The model's own, which is 50 in a documented checkpoint; a model with a context is at its best with fewer.
    assert run.num_steps is None


def test_help_shows_each_documented_argument(inference, training, capsys):
    for module, names in ((inference, INFER_TOKCOM), (training, TRAIN_TOKCOM)):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        told = capsys.readouterr().out
        assert all(f"--{name}" in told for name in names)


# ------------------------------------------------------------------------------------------------------------ training
def test_training_as_typed_runs_both_stages(training, place, monkeypatch):
    values = parse_recipe("", training.SECTIONS, training.DEFAULT_CONFIG, [], TRAIN_TOKCOM)
    assert training.RunArguments(**values["run"]).stage == "both"
    monkeypatch.chdir(place)
    sizes = ["--context.hidden_size", "32", "--context.intermediate_size", "48", "--context.num_hidden_layers", "1"]
    sizes += ["--vae.latent_size", "16", "--length", "64", "--tokenizer_vocab_size", "300", "--sample_steps", "2"]
    steps = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--sample_every", "0", "--batch_size", "2"]
    training.main([*SMALL, *sizes, *steps, "--output_dir", "default"])
    assert isinstance(load_model("default"), TokComModel)


def load_model(folder: str):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_both_stages_leave_the_documented_files(place):
    kept = {
        name: torch.load(place / "checkpoints" / f"best_{name}.pt", weights_only=True) for name in ("vae", "diffusion")
    }
    for stage, content in kept.items():
        assert set(content) == {
            "epoch", "stage", "val_loss", "model_args", "config", "vae_model_state_dict", "denoised_model_state_dict",
        }  # fmt: skip
        assert content["stage"] == stage and type(content["epoch"]) is int and type(content["val_loss"]) is float
        assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                "vocab_size", "omni_token_id"} <= set(content["model_args"])  # fmt: skip
        assert content["config"] == {
            "tokenizer_path": "tokenizer",
            "max_length": 64,
            "chunk_size": 4,
            "noise_std": 0.05,
        }
    # The second stage trains the denoiser alone.
    assert kept["vae"]["denoised_model_state_dict"] == {} and kept["diffusion"]["denoised_model_state_dict"]
    for name, value in kept["vae"]["vae_model_state_dict"].items():
        assert torch.equal(value, kept["diffusion"]["vae_model_state_dict"][name]), name


def test_the_best_checkpoint_by_held_out_loss_is_kept_with_its_epoch(place):
    for stage, folder, beside in (("vae", "vae", "vae"), ("diffusion", "denoiser", ".")):
        newest = max((place / "checkpoints" / folder).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
        losses = [(line["eval_loss"], line["epoch"]) for line in history if "eval_loss" in line]
        loss, epoch = min(losses)
        assert len(losses) == 2
        content = torch.load(place / "checkpoints" / f"best_{stage}.pt", weights_only=True)
        assert (content["val_loss"], content["epoch"]) == (loss, epoch)
        best = json.loads((place / "checkpoints" / beside / "best.json").read_text())
        assert (best["stage"], best["value"], best["epoch"]) == (stage, loss, epoch)


@pytest.mark.parametrize(("kept", "expected"), [(True, (1, 1.25)), (False, (3, 2.5))])
def test_what_is_recorded_belongs_to_the_weights_that_are_saved(training, tmp_path, kept, expected):
    """The best evaluation's where its weights are loaded at the end, else the last one's."""
    record = {"stage": "diffusion", "epoch": 1.0, "step": 2, "metric": "loss", "value": 1.25, "checkpoint": None}
    history = [{"step": 2, "epoch": 1.0, "eval_loss": 1.25}, {"step": 6, "epoch": 2.5, "eval_loss": 2.5}]
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: True,
        best_model=SimpleNamespace(record=record),
        args=SimpleNamespace(load_best_model_at_end=kept),
        state=SimpleNamespace(global_step=6, epoch=2.5, log_history=history),
    )
    shape = {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
        "num_hidden_layers": 1,
    }  # fmt: skip
    model = TokComModel(TokComConfig(vae={"vocab_size": 11, **shape}, denoiser=shape, max_chunks=2))
    run = training.RunArguments(tokenizer="tokens", pt_checkpoints=True)
    training.keep_best(trainer, model, tmp_path / "best_diffusion.pt", run)
    content = torch.load(tmp_path / "best_diffusion.pt", weights_only=True)
    assert (content["epoch"], content["val_loss"]) == expected and content["config"]["tokenizer_path"] == "tokens"
    assert (tmp_path / "best.json").is_file() == kept


def test_each_epoch_and_each_batch_is_logged_by_name(place):
    names = {"vae": ("vae", ["batch_loss"]), "denoiser": ("diffusion", ["batch_ce_loss", "batch_mse_loss"])}
    for folder, (stage, batches) in names.items():
        newest = max((place / "checkpoints" / folder).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        state = json.loads((newest / "trainer_state.json").read_text())
        history = state["log_history"]
        for name in batches:
            assert sum(f"{stage}/{name}" in line for line in history) == state["global_step"]
        losses = [line["loss"] for line in history if "loss" in line]
        means = [line[f"{stage}/train_loss"] for line in history if f"{stage}/train_loss" in line]
        half = len(losses) // 2
        expected = [sum(part) / half for part in (losses[:half], losses[half:])]
        assert means == pytest.approx(expected, rel=1e-4)
        rate = {"vae": 1e-4, "denoiser": 3e-5}[folder]
        assert [line[f"{stage}/learning_rate"] for line in history if f"{stage}/learning_rate" in line] == [rate] * 2
        held_out = [line["eval_loss"] for line in history if "eval_loss" in line]
        assert [line[f"{stage}/val_loss"] for line in history if f"{stage}/val_loss" in line] == held_out
        best = [line[f"{stage}/best_val_loss"] for line in history if f"{stage}/best_val_loss" in line]
        assert best == [held_out[0], min(held_out)]


def test_the_three_sample_tables_are_written_after_each_epoch(place):
    found = {}
    for folder in ("vae", "denoiser"):
        for line in (place / "checkpoints" / folder / "samples.jsonl").read_text().splitlines():
            table = json.loads(line)
            found.setdefault(table["table"], []).append(table)
    assert {name: [table["epoch"] for table in tables] for name, tables in found.items()} == {
        "vae/reconstructions": [1, 2], "diffusion/samples": [1, 2], "diffusion/denoising": [1, 2],
    }  # fmt: skip
    for name, columns in (
        ("vae/reconstructions", ["text", "reconstruction", "token accuracy"]),
        ("diffusion/samples", ["generated"]),
        ("diffusion/denoising", ["text", "denoised from t=0.5", "token accuracy"]),
    ):
        assert all(len(found[name][0][column]) == 2 for column in columns)


def test_files_of_another_architecture_are_refused_before_training(training, place, monkeypatch):
    monkeypatch.chdir(place)
    words = ["--config", str(PAPER), *SMALL, *SHORTER, "--vae.latent_size", "16", "--output_dir", "other"]
    with pytest.raises(ValueError, match=r"cannot hold this model: vae\.latent_size=16"):
        training.main(words)
    assert not (place / "other").exists()


# ----------------------------------------------------------------------------------------------------------- inference
def test_generate_as_typed(run, passes):
    printed = run(*COMMANDS["generate"])
    assert [latents.shape for latents, _ in passes] == [(2, 256, 32)] * 50
    assert [time for _, time in passes] == pytest.approx([step / 50 for step in range(50)])
    assert passes[0][0].std().item() == pytest.approx(0.05, rel=0.05) and printed.strip()


def test_reconstruct_as_typed(run, passes):
    printed = run(*COMMANDS["reconstruct"])
    model, tokenizer = load_checkpoint_file(CHECKPOINT)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    filled = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 4), value=tokenizer.eos_token_id)
    text = tokenizer.decode(model.reconstruct(filled)[0, : ids.shape[1]], skip_special_tokens=True)
    assert text in printed and f"over {ids.shape[1]} tokens" in printed and not passes


def test_denoise_reconstruct_as_typed(run, passes):
    run(*COMMANDS["denoise_reconstruct"])
    assert [time for _, time in passes] == pytest.approx([0.5 + step / 50 for step in range(25)])


def noisy(run, level: str, text: str = TEXT, seed: str = "0") -> str:
    words = ["--checkpoint", CHECKPOINT, "--mode", "denoise_reconstruct", "--noise_level", level, "--num_steps", "50"]
    return run(*words, "--input_text", text, "--seed", seed).split("tokens\n", 1)[1]


def clean_latents() -> torch.Tensor:
    model, tokenizer = load_checkpoint_file(CHECKPOINT)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        return model.encode(torch.nn.functional.pad(ids, (0, -ids.shape[1] % 4), value=tokenizer.eos_token_id))


def test_noise_level_0_is_pure_noise(run, passes):
    found = noisy(run, "0.0")
    assert len(passes) == 50 and passes[0][0].std().item() == pytest.approx(0.05, rel=0.1)
    # Nothing of the text is left: another one of the same length gives the same result.
    assert noisy(run, "0.0", TEXT[::-1]) == found


@pytest.mark.parametrize(("level", "steps"), [(0.5, 25), (0.9, 5)])
def test_noise_level_is_the_share_of_the_original(run, passes, level, steps):
    noisy(run, str(level))
    assert len(passes) == steps
    noise = (passes[0][0] - level * clean_latents()) / (1 - level)
    assert noise.std().item() == pytest.approx(0.05, rel=0.15)


def test_noise_level_1_is_the_reconstruction(run, passes):
    found = noisy(run, "1.0")
    assert not passes and found == run(*COMMANDS["reconstruct"]).split("tokens\n", 1)[1]


def test_encode_as_typed_and_what_it_wrote_is_decoded(run, inside):
    printed = run(*COMMANDS["encode"])
    content = torch.load(inside / "latents.pt", weights_only=True)
    count = json.loads(content["token_count"])[0]
    assert content["latents"][0].shape == (-(-count // 4), 32) and f"{count} tokens in" in printed
    decoded = run("--checkpoint", CHECKPOINT, "--mode", "decode", "--latents", "latents.pt")
    whole = run("--checkpoint", CHECKPOINT, "--mode", "reconstruct", "--input_text", "你要编码的文本内容")
    assert decoded == whole.split("tokens\n", 1)[1]


def test_conditional_as_typed_keeps_the_prompt(run, passes):
    printed = run(*COMMANDS["conditional"])
    assert printed.startswith("The family of four was ") and len(passes) == 50
    model, tokenizer = load_checkpoint_file(CHECKPOINT)
    ids = torch.tensor([tokenizer("The family of four was ").input_ids])
    chunks = -(-ids.shape[1] // 4)
    # The prompt's chunks, filled in front, stand before 64 noisy ones, and are the same in every pass.
    filled = torch.nn.functional.pad(ids, (-ids.shape[1] % 4, 0), value=tokenizer.eos_token_id)
    with torch.no_grad():
        prompt = model.encode(filled)
    assert all(latents.shape == (1, chunks + 64, 32) for latents, _ in passes)
    for latents, _ in passes:
        torch.testing.assert_close(latents[:, :chunks], prompt)
    assert passes[0][0][:, chunks:].std().item() == pytest.approx(0.05, rel=0.1)


def test_a_run_without_num_steps_takes_the_documented_50(run, passes):
    run("--checkpoint", CHECKPOINT, "--num_chunks", "3")
    assert [latents.shape for latents, _ in passes] == [(1, 3, 32)] * 50


def test_the_device_and_the_output_file_act(run, inside):
    run("--checkpoint", CHECKPOINT, "--num_chunks", "3", "--device", "cpu", "--output_file", "out.txt", "--seed", "1")
    text = (inside / "out.txt").read_text()
    assert run("--checkpoint", CHECKPOINT, "--num_chunks", "3", "--seed", "1").strip("\n") == text.strip("\n")
    with pytest.raises(ValueError, match="--device nowhere cannot be used"):
        run("--checkpoint", CHECKPOINT, "--num_chunks", "3", "--device", "nowhere")


def test_a_checkpoint_names_its_tokenizer_or_asks_for_it(run, inside, tmp_path):
    content = torch.load(CHECKPOINT, weights_only=True)
    content["config"]["tokenizer_path"] = "no/such-tokenizer"
    torch.save(content, tmp_path / "moved.pt")
    words = ["--checkpoint", str(tmp_path / "moved.pt"), "--num_chunks", "3", "--seed", "1"]
    with pytest.raises(OSError, match=r"'no/such-tokenizer', which cannot be loaded; give it.* with --tokenizer"):
        run(*words)
    told = run(*words, "--tokenizer", "tokenizer")
    assert told == run("--checkpoint", CHECKPOINT, "--num_chunks", "3", "--seed", "1")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run("--checkpoint", "checkpoints/none.pt")
    with pytest.raises(ValueError, match=r"needs a TokComModel, but .* holds a TokComVAE"):
        run("--checkpoint", "checkpoints/best_vae.pt")


def test_a_model_folder_is_a_checkpoint_too(run):
    words = ["--num_chunks", "3", "--num_steps", "50", "--seed", "1"]
    assert run("--checkpoint", "checkpoints", *words) == run("--checkpoint", CHECKPOINT, *words)


def test_the_snippet_runs_as_printed(inside, passes, capsys):
    names: dict = {}
    exec(SNIPPET, names)
    assert names["token_ids"].shape == (1, 1024) and len(passes) == 50
    assert names["model_args"].hidden_size == 32 and names["config"]["noise_std"] == 0.05
    assert capsys.readouterr().out == names["text"] + "\n"
