"""recipes/prepare_shakespeare.py: the split, its checksum, and a tokenizer that has seen the training part alone."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from tests.helpers.recipes import call
from tokcom_hf.cli import RecipeError
from tokcom_hf.data.text import load_text_rows
from tokcom_hf.data.tokenizers import load_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "prepare_shakespeare.py"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Lines of 8 common words; the last 5 % of them hold one word that stands nowhere else."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "thëta"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(1, 9))) for _ in range(1000)]
    lines[951:] = [line + " quokkaquokka" for line in lines[951:]]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def prepared(text_file) -> Path:
    out = text_file.parent / "prepared"
    call(
        "prepare_shakespeare",
        "--text_file",
        text_file,
        "--sha256",
        "none",
        "--output_dir",
        out,
        "--tokenizer_vocab_size",
        285,
    )
    return out


def test_the_parts_are_the_text_cut_at_line_ends(text_file, prepared):
    text = text_file.read_text(encoding="utf-8")
    parts = [(prepared / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "development", "test")]
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts)
    longest = max(map(len, text.splitlines())) + 1
    assert 0 <= len(parts[0]) - 0.9 * len(text) <= longest
    assert 0 <= len(parts[0] + parts[1]) - 0.95 * len(text) <= longest
    report = json.loads((prepared / "split.json").read_text(encoding="utf-8"))
    assert list(report["characters"].values()) == list(map(len, parts))
    assert report["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()


def test_the_tokenizer_has_seen_the_training_part_alone_and_is_the_one_that_training_makes(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    assert len(tokenizer) == 285
    assert len(tokenizer.encode(" epsilon")) < 4 <= len(tokenizer.encode(" quokkaquokka"))
    trained = load_text_rows(
        train_file=str(prepared / "train.txt"), validation_file=str(prepared / "test.txt"), vocab_size=285, length=32
    ).tokenizer
    assert trained.get_vocab() == tokenizer.get_vocab()


def test_another_text_needs_its_own_checksum(text_file, tmp_path):
    arguments = ("--text_file", text_file, "--output_dir", tmp_path / "out", "--tokenizer_vocab_size", 257)
    digest = hashlib.sha256(text_file.read_bytes()).hexdigest()
    with pytest.raises(RecipeError, match=f"{digest}, expected 1f921c97"):
        call("prepare_shakespeare", *arguments)
    with pytest.raises(RecipeError, match=f"{digest}, expected {'0' * 64}"):
        call("prepare_shakespeare", *arguments, "--sha256", "0" * 64)
    assert not (tmp_path / "out").exists()
    call("prepare_shakespeare", *arguments, "--sha256", digest.upper())
    with pytest.raises(FileExistsError, match="--overwrite"):
        call("prepare_shakespeare", *arguments, "--sha256", digest)
    call("prepare_shakespeare", *arguments, "--sha256", digest, "--overwrite")


def test_a_text_without_enough_lines_and_a_missing_one_are_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one line\nand another\n")
    with pytest.raises(RecipeError, match="nothing is left for development and test"):
        call("prepare_shakespeare", "--text_file", short, "--sha256", "none", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="--text_file"):
        call("prepare_shakespeare", "--output_dir", tmp_path / "out")
