"""recipes/benchmarks/vae_compression.py: its rows, their controls, and what decides a row."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tests.helpers.recipes import call
from tokcom_hf.cli import RecipeError
from tokcom_hf.data.tokenizers import load_tokenizer, train_tokenizer

BENCHMARK = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "vae_compression.py"
SMALL = ("hidden_size=32", "intermediate_size=48", "latent_size=64", "num_attention_heads=2", "num_key_value_heads=1",
         "initializer_range=0.18", "embedding_initializer_range=0.5")  # fmt: skip
OPTIONS = [f"vae.{option}" for option in SMALL]
OPTIONS += [
    "use_cpu=true",
    "run.tokenizer_vocab_size=280",
    "vae_training.learning_rate=0.01",
    "vae_training.warmup_steps=5",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """Training and held-out text of the same words."""
    draw = random.Random(0)
    words = ["the", "a", "quick", "brown", "fox", "dog", "jumps", "over", "runs", "under", "lazy", "red", "old", "new"]
    folder = tmp_path_factory.mktemp("text")
    files = folder / "train.txt", folder / "held_out.txt"
    for file, documents in zip(files, (100, 20)):
        file.write_text("\n\n\n".join(" ".join(draw.choice(words) for _ in range(60)) for _ in range(documents)))
    return files


@pytest.mark.slow
def test_rows_learn_what_their_untrained_controls_do_not(tmp_path, texts, capsys):
    train, held_out = texts
    tokenizer = train_tokenizer([train.read_text()], 270)
    tokenizer.save_pretrained(tmp_path / "words")
    out = tmp_path / "out"
    arguments = ["--train_file", train, "--validation_file", held_out, "--tokenizers", "none", tmp_path / "words"]
    arguments += ["--length", 32, "--max_steps", 100, "--output_dir", out, "--rows", 16, "--options", *OPTIONS]
    call("benchmarks/vae_compression", *arguments, "--chunk_sizes", 2)
    table = json.loads((out / "vae_compression.json").read_text())
    assert list(table) == ["2to1_own", "2to1_words"]
    assert [row["vocabulary"] for row in table.values()] == [280, 270]
    for name, row in table.items():
        assert row["token_accuracy"] > 0.9 and row["token_accuracy"] > row["token_accuracy_sigma_1"]
        assert row["untrained"]["token_accuracy"] < 0.1
        assert row["steps"] == 100 and row["latent_size"] == 64
        # The figure is that of the saved model, on the held-out file.
        vae, words = AutoModel.from_pretrained(out / name / "vae"), load_tokenizer(out / name / "vae")
        ids = words(held_out.read_text().split("\n\n\n")[0], return_tensors="pt").input_ids[:, :32]
        with torch.no_grad():
            right = (vae.decode(vae.encode(ids)) == ids).float().mean().item()
        assert right == pytest.approx(row["token_accuracy"], abs=0.15)
    assert (out / "accuracy_against_noise.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("untrained") == 2 and f"{100 * table['2to1_own']['token_accuracy_sigma_0.7']:.3f}" in printed
    # Finished rows are kept, new ones come to them.
    arguments[arguments.index("--tokenizers") + 1 : arguments.index("--length")] = [tmp_path / "words"]
    call("benchmarks/vae_compression", *arguments, "--chunk_sizes", 2, 8)
    printed = capsys.readouterr().out
    assert printed.count("training 8to1_words") == 1 == printed.count("(log in")
    table = json.loads((out / "vae_compression.json").read_text())
    assert [row["chunk_size"] for row in table.values()] == [2, 2, 8]
    assert table["8to1_words"]["vocabulary"] == 270
    assert {"token_accuracy_sigma_0.5", "rare_token_accuracy", "random_token_accuracy"} <= set(table["8to1_words"])


def test_a_chunk_size_that_does_not_divide_the_rows_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="got 32 and 5"):
        call("benchmarks/vae_compression", "--chunk_sizes", 5, "--length", 32, "--output_dir", tmp_path)
