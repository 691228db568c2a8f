"""recipes/infer_tokcom.py: its six modes, its seeds, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import load
from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.data.tokenizers import train_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "infer_tokcom.py"
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
# Longer than the model's four chunks of training length, and no multiple of the chunk size.
TEXT = "The quick  brown fox\njumps over 13 lazy dogs. " * 3 + "End"


class CopyingVAE:
    """Replaces encode and decode by a lossless pair, so that what a mode does to a text can be read off."""

    @staticmethod
    def encode(self, input_ids):
        chunks = input_ids.view(len(input_ids), -1, self.config.chunk_size)
        return torch.nn.functional.pad(chunks.float(), (0, self.config.latent_size - self.config.chunk_size))

    @staticmethod
    def decode(self, latents):
        assert latents.shape[1] <= 256
        return latents[..., : self.config.chunk_size].round().long().flatten(1)


@pytest.fixture(scope="module", params=["documented", "context"])
def folder(request, tmp_path_factory) -> Path:
    """A model without or with a context, its tokenizer, and the VAE alone beside it."""
    tokenizer = train_tokenizer([TEXT] * 3, 280)
    torch.manual_seed(0)
    vae = {"vocab_size": len(tokenizer) + 1, "latent_size": 16, "fixed_norm": True, "chunk_projection": "all", **SHAPE}
    kind = {"clean_prefix": True} if request.param == "documented" else {"context": SHAPE, "block_size": 1}
    model = TokComModel(
        TokComConfig(
            vae=vae, denoiser=SHAPE, standardize_latents=True, noise_std=1.0, max_chunks=4, **kind,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    path = tmp_path_factory.mktemp(request.param) / "tokcom"
    for target, part in ((path, model), (path.with_name("vae"), model.vae)):
        part.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return path


@pytest.fixture
def recipe(monkeypatch, folder, capsys):
    """Runs the recipe's main() in this process; returns what it printed."""
    module = load("infer_tokcom")

    def run(*arguments, model: Path = folder) -> str:
        words = [*map(str, arguments), "--model", str(model), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *words])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def lossless(monkeypatch):
    from tokcom_hf.models.modeling_tokcom_vae import TokComVAE

    monkeypatch.setattr(TokComVAE, "encode", CopyingVAE.encode)
    monkeypatch.setattr(TokComVAE, "decode", CopyingVAE.decode)


def test_generate_is_reproducible_and_batched(recipe, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ("--mode", "generate", "--num_chunks", 3, "--num_steps", 2, "--batch_size", 2, "--output_file", out)
    first = recipe(*arguments, "--seed", 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 and all(row["text"] in first for row in rows)
    assert recipe(*arguments, "--seed", 1) == first != recipe(*arguments, "--seed", 2)
    longer = (*arguments, "--num_chunks", 64)
    assert recipe(*longer) != recipe(*longer)


def test_conditional_continues_every_prompt_whatever_the_batch(recipe, tmp_path):
    prompts = ["The quick", "dogs", "over 13 lazy"]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(json.dumps({"text": prompt}) for prompt in prompts))
    short = ("--mode", "conditional", "--num_generate_chunks", 2, "--num_steps", 2, "--seed", 0)
    for batch_size in (1, 2, 3):
        recipe(*short, "--input_file", file, "--batch_size", batch_size, "--output_file", out)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["text"].startswith(prompt) for row, prompt in zip(rows, prompts, strict=True))
        assert all(len(row["text"]) > len(prompt) for row, prompt in zip(rows, prompts))
    assert recipe(*short, "--prompt", "The quick").startswith("The quick")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_reconstruct_gives_back_the_whole_text(recipe, lossless, tmp_path, batch_size):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text(TEXT)
    printed = recipe("--mode", "reconstruct", "--input_file", source, "--output_file", out, "--batch_size", batch_size)
    assert out.read_text() == TEXT
    assert "token accuracy 100.0000%" in printed and TEXT in printed


def test_denoising_from_no_noise_is_reconstruction_and_more_noise_is_seeded(recipe, lossless):
    arguments = ("--mode", "denoise_reconstruct", "--text", TEXT, "--num_steps", 4, "--seed", 0)
    assert TEXT in recipe(*arguments, "--noise_level", 1)


def test_denoising_is_seeded(recipe):
    arguments = ("--mode", "denoise_reconstruct", "--text", TEXT, "--num_steps", 4)
    noisy = [recipe(*arguments, "--noise_level", 0, "--seed", seed) for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]


def test_encode_and_decode_are_a_round_trip_through_a_file(recipe, lossless, tmp_path):
    texts, file, out = [TEXT, "a", "Four"], tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    latents = tmp_path / "sub" / "latents.safetensors"
    printed = recipe("--mode", "encode", "--input_file", file, "--text_column", "body", "--output_file", latents)
    assert "1 tokens in 1 latents of 16" in printed
    recipe("--mode", "decode", "--latents", latents, "--output_file", out)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == texts


def test_a_vae_alone_encodes_and_the_whole_model_decodes_the_same(recipe, folder, tmp_path):
    latents, vae = tmp_path / "latents.safetensors", folder.with_name("vae")
    recipe("--mode", "encode", "--text", TEXT, "--output_file", latents, model=vae)
    decoded = recipe("--mode", "decode", "--latents", latents)
    assert decoded == recipe("--mode", "decode", "--latents", latents, model=vae)
    assert decoded.strip("\n") in recipe("--mode", "reconstruct", "--text", TEXT)
    with pytest.raises(ValueError, match=r"needs a TokComModel, but .* holds a TokComVAE"):
        recipe("--mode", "generate", model=vae)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "dream"), "--mode must be one of generate, reconstruct"),
        (("--num_steps", 0), "--num_steps must be at least 1, got 0"),
        (("--num_steps", -3), "--num_steps must be at least 1, got -3"),
        (("--num_chunks", 0), "--num_chunks must be at least 1"),
        (("--batch_size", 0), "--batch_size must be at least 1"),
        (("--temperature", -1), "--temperature must not be negative"),
        (("--mode", "denoise_reconstruct", "--text", "a", "--noise_level", 1.5), r"must be in \[0, 1\], got 1.5"),
        (("--mode", "denoise_reconstruct", "--text", "a", "--noise_level", -0.1), r"must be in \[0, 1\], got -0.1"),
        (("--mode", "encode", "--text", "a"), "needs --output_file"),
        (("--mode", "decode"), "needs --latents"),
        (("--mode", "decode", "--latents", "none.safetensors"), "does not exist"),
        (("--mode", "reconstruct"), "needs either --text or --input_file"),
        (("--mode", "reconstruct", "--text", "a", "--input_file", "b"), "needs either --text or --input_file"),
        (("--mode", "reconstruct", "--input_file", "none.txt"), "does not exist"),
        (("--mode", "reconstruct", "--text", ""), "holds an empty one"),
        (("--mode", "conditional"), "needs either --prompt or --input_file"),
        (("--sampler", "magic"), "sampler must be one of"),
        (("--tokenizer", "."), "Tokenizer '.' cannot be loaded"),
        (("--num_step", 3), "Did you mean"),
        (("--best_of", 0), "--best_of must be at least 1"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(recipe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        recipe(*arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_wrong_models_tokenizers_and_latents_are_refused(recipe, folder, tmp_path):
    with pytest.raises(OSError, match=r"Model '.*nothing' cannot be loaded"):
        recipe("--mode", "generate", model=tmp_path / "nothing")
    train_tokenizer([TEXT], 270).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="has 270 tokens but the model was trained with 280"):
        recipe("--mode", "generate", "--tokenizer", tmp_path / "tokenizer")
    latents = tmp_path / "latents.safetensors"
    recipe("--mode", "encode", "--text", TEXT, "--output_file", latents)
    model = TokComModel.from_pretrained(folder)
    with torch.no_grad():
        model.vae.embed_tokens.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was written by another model"):
        recipe("--mode", "decode", "--latents", latents, "--tokenizer", folder, model=tmp_path / "other")


@pytest.mark.slow
def test_the_command_line_prints_one_sentence_for_a_mistake(folder):
    command = [sys.executable, str(RECIPE), "--model", str(folder), "--mode", "decode", "--latents", str(RECIPE)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: " in result.stderr.splitlines()[-1] and "is truncated or no safetensors file" in result.stderr


OPTIONS = {
    "num_steps": 7, "sampler": "heun", "temperature": 0.3, "block_size": 2, "best_of": 3, "guidance_scale": 1.5,
}  # fmt: skip


def test_options_of_generation_reach_the_model(recipe, monkeypatch):
    seen = {}

    def generate(self, input_ids=None, **options):
        seen.update(options)
        return torch.zeros(1, 4, dtype=torch.long)

    monkeypatch.setattr(TokComModel, "generate", generate)
    for mode in (("generate",), ("conditional", "--prompt", "a")):
        seen.clear()
        recipe("--mode", *mode)
        assert not OPTIONS.keys() & seen.keys(), "what is not said is the model's own"
        recipe("--mode", *mode, *[word for name, value in OPTIONS.items() for word in (f"--{name}", value)])
        assert {name: seen[name] for name in OPTIONS} == OPTIONS


def test_options_of_generation_act(folder, recipe):
    model = TokComModel.from_pretrained(folder)
    context = model.context is not None
    plain = recipe("--mode", "generate", "--num_chunks", 3, "--num_steps", 2, "--seed", 1)
    options = [("--temperature", 0.5), ("--sampler", "heun"), ("--num_steps", 3)]
    for option in options + ([("--block_size", 0)] if context else []):
        assert plain != recipe("--mode", "generate", "--num_chunks", 3, "--num_steps", 2, "--seed", 1, *option)
    still = [recipe("--mode", "generate", "--num_chunks", 3, "--temperature", 0, "--seed", seed) for seed in (1, 2)]
    assert still[0] == still[1]
    for option, message in (
        (("--block_size", 1), "in a model with a context"),
        (("--guidance_scale", 2), "context_dropout"),
    ):
        if not context:
            with pytest.raises(ValueError, match=message):
                recipe("--mode", "generate", *option)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("reconstruct", "num_steps"), ("reconstruct", "seed"), ("denoise_reconstruct", "temperature"),
     ("encode", "sampler"), ("decode", "block_size"), ("denoise_reconstruct", "best_of"), ("encode", "guidance_scale"),
     ("conditional", "num_chunks"), ("generate", "num_generate_chunks"), ("reconstruct", "noise_level"),
     ("generate", "prompt"), ("conditional", "text"), ("decode", "input_file"), ("encode", "latents")],
)  # fmt: skip
def test_an_option_that_a_mode_does_not_use_is_refused(recipe, mode, name):
    value = "euler" if name == "sampler" else 1
    source = () if mode in ("generate", "decode", "conditional") else ("--text", "a")
    with pytest.raises(ValueError, match=f"--{name} has no meaning in mode {mode}; it belongs to"):
        recipe("--mode", mode, *source, f"--{name}", value)


@pytest.mark.parametrize("flag", ["--posterior_temperature", "--token_lag"])
def test_removed_options_are_refused(recipe, flag):
    with pytest.raises(ValueError, match=flag):
        recipe("--mode", "generate", flag, 1)


def test_the_steps_of_the_model_are_the_default(recipe, folder, tmp_path):
    model = TokComModel.from_pretrained(folder)
    model.config.num_steps = 3
    model.save_pretrained(tmp_path / "few")
    passes = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: passes.append(1) if type(module).__name__ == "DenoisedModel" else None
    )
    try:
        for mode in (("generate", "--num_chunks", 1), ("denoise_reconstruct", "--text", "dogs", "--noise_level", 0)):
            passes.clear()
            recipe("--mode", *mode, "--tokenizer", folder, model=tmp_path / "few")
            assert len(passes) == 3, mode
    finally:
        handle.remove()
