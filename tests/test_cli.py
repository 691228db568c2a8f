"""Recipe arguments: YAML sections, command-line overrides, and errors that help."""

import io
from dataclasses import dataclass, field

import pytest

from tokcom_hf.cli import RecipeError, parse_recipe, read_yaml, run_recipe
from tokcom_hf.documented_names import Alias
from tokcom_hf.suggestions import suggestion


@dataclass
class Model:
    width: int = 8
    rate: float = 0.1
    names: list[str] = field(default_factory=list)


@dataclass
class Run:
    seed: int = 0
    width: int = 3
    path: str | None = field(default=None, metadata={"help": "Where to read."})
    fast: bool = False


SECTIONS = {"model": Model, "run": Run}


def parse(*argv, config=None):
    return parse_recipe("Doc.", SECTIONS, config, list(argv))


def test_command_line_overrides_the_file_and_a_plain_name_reaches_every_section(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model:\n  width: 16\n  rate: 5e-4\nrun:\n  seed: 7\n")
    assert parse(config=file) == {"model": {"width": 16, "rate": 5e-4}, "run": {"seed": 7}}
    values = parse("--width", "4", "--model.rate=1e-2", "--fast", "--path", "123", config=file)
    assert values == {"model": {"width": 4, "rate": 0.01}, "run": {"seed": 7, "width": 4, "fast": True, "path": "123"}}
    assert parse("--config", str(file), "--model.names", "a", "b")["model"]["names"] == ["a", "b"]


def test_scientific_notation_is_a_number():
    assert read_yaml("5e-4") == 5e-4 and read_yaml("1e5") == 1e5 and read_yaml("-2.5E+3") == -2500.0
    assert read_yaml("e5") == "e5" and read_yaml("12") == 12


def test_no_is_a_word_and_true_a_boolean():
    assert [read_yaml(word) for word in ("no", "yes", "off", "true", "False")] == ["no", "yes", "off", True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widht", "3"], "Did you mean width"),
        (["--modl.width", "3"], "unknown section 'modl'"),
        (["--model.seed", "3"], "no such option"),
        (["--seed", "x"], "expected int, got 'x'"),
        (["--fast", "maybe"], "expected bool"),
        (["positional"], "Unexpected argument"),
        (["--config", "missing.yaml"], "does not exist"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(RecipeError, match=message):
        parse(*arguments)


def test_unknown_section_in_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text("modell:\n  width: 1\n")
    with pytest.raises(RecipeError, match="unknown section 'modell'"):
        parse(config=tmp_path / "config.yaml")


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "Doc." in text and "--width (default 8)" in text and "Where to read." in text


def test_a_users_mistake_is_one_line(capsys):
    def main():
        raise ValueError("Too small.")

    with pytest.raises(SystemExit) as stop:
        run_recipe(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: Too small.\n"


def test_a_configuration_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes("run:\n  path: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.yaml, line 2: not UTF-8 text"):
        parse(config=file)
    file.write_bytes(b"\xef\xbb\xbfrun:\n  path: caf\xc3\xa9\n")
    assert parse(config=file)["run"] == {"path": "café"}


PRUNING = [
    "adversarial_weight",
    "discriminator_learning_rate",
    "keep_tokens",
    "kl_weight",
    "learning_rate",
    "task_weight",
]
PRUNING += ["merge_sparsity_weight", "num_train_epochs", "per_device_train_batch_size", "temperature_start"]
INFERENCE = ["input_file", "model", "noise_level", "num_steps", "output_file", "prompt", "temperature", "text"]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("adv_loss_weight", PRUNING, "adversarial_weight"),
        ("adv_loss_weight", ["task_weight", "kl_weight"], None),
        ("disc_lr", PRUNING, "discriminator_learning_rate"),
        ("learning_rat", PRUNING, "learning_rate"),
        ("task_loss_weight", PRUNING, "task_weight"),
        ("epochs", PRUNING, "num_train_epochs"),
        ("weight", PRUNING, None),
        ("input_text", INFERENCE, "text"),
        ("input_text", ["input_file"], None),
        ("input_fiel", INFERENCE, "input_file"),
        ("outputfile", INFERENCE, "output_file"),
        ("checkpoint", INFERENCE, "model"),
        ("promt", INFERENCE, "prompt"),
        ("entirely_else", INFERENCE, None),
    ],
)
def test_a_proposal_means_what_was_typed_or_is_not_made(name, known, meant):
    assert suggestion(name, known) == meant


def test_traceback_is_a_flag_of_every_recipe(monkeypatch):
    assert parse("--traceback", "--seed", "3") == {"model": {}, "run": {"seed": 3}}
    monkeypatch.setattr("sys.argv", ["recipe", "--traceback"])

    def main():
        raise ValueError("Too small.")

    with pytest.raises(SystemExit) as stop:
        run_recipe(main)
    assert isinstance(stop.value.__cause__, ValueError)


def test_printing_never_fails(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", terminal)
    run_recipe(lambda: print("μ ± σ"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"? ? ?\n"


ALIASES = {
    "breite": "model.width",
    "device": Alias("run.fast", lambda value: {"cuda": True, "cpu": False}[value]),
    "both": Alias(("run.width", "run.seed"), lambda value: (value, value + 1)),
    "settings.optimizers.merger.lr": "model.rate",
    "settings.names": "model.names",
    "other.names": "model.names",
    "a.lr": "run.seed",
}


def documented(*argv, config=None):
    return parse_recipe("Doc.", SECTIONS, config, list(argv), ALIASES)


def test_a_documented_name_sets_its_option():
    assert documented("--breite", "4", "--device", "cuda") == {"model": {"width": 4}, "run": {"fast": True}}
    assert documented("--both", "4")["run"] == {"width": 4, "seed": 5}
    # The last part of a path is a flag where all paths that end so mean one option.
    assert documented("--names", "a", "b")["model"] == {"names": ["a", "b"]}
    assert documented("--settings.optimizers.merger.lr", "2e-5")["model"] == {"rate": 2e-5}
    with pytest.raises(RecipeError, match="no such option"):
        documented("--lr", "1")
    with pytest.raises(RecipeError, match="--breite: expected int, got 'x'"):
        documented("--breite", "x")
    with pytest.raises(RecipeError, match=r"no such option\. Did you mean breite"):
        documented("--briete", "4")


def test_documented_sections_of_a_yaml_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text('run:\n  seed: 2\nsettings:\n  names: [x]\n  optimizers:\n    merger:\n      lr: "2e-05"\n')
    assert documented(config=file) == {"model": {"names": ["x"], "rate": 2e-5}, "run": {"seed": 2}}
    file.write_text("settings:\n  names: [x]\n  optimisers:\n    merger:\n      lr: 1\n")
    with pytest.raises(
        RecipeError, match=r"\.optimisers\.merger\.lr: .*Did you mean settings\.optimizers\.merger\.lr"
    ):
        documented(config=file)
    file.write_text("unknown:\n  names: [x]\n")
    with pytest.raises(RecipeError, match="unknown section 'unknown'"):
        documented(config=file)


def test_options_may_stand_without_a_section_where_documented_names_do(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("breite: 4\nseed: 3\n")
    assert documented(config=file) == {"model": {"width": 4}, "run": {"seed": 3}}
    with pytest.raises(RecipeError, match="unknown section 'breite'"):
        parse(config=file)


@dataclass
class Source:
    file: str | None = field(default=None, metadata={"replaces": ("name", "part")})
    name: str | None = None
    part: str | None = None


def test_what_the_command_line_names_replaces_what_only_the_file_names(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("source:\n  name: a\n  part: b\n")

    def given(*argv):
        return parse_recipe("Doc.", {"source": Source}, config, list(argv))["source"]

    assert given() == {"name": "a", "part": "b"}
    assert given("--file", "c") == {"file": "c"}
    assert given("--file", "none") == {"file": None, "name": "a", "part": "b"}
    # What is typed stays, so that the recipe can refuse both.
    assert given("--file", "c", "--name", "d") == {"file": "c", "name": "d"}
    config.write_text("source:\n  file: c\n  name: a\n")
    assert given() == {"file": "c", "name": "a"}


@dataclass
class OptionalFields:
    tokens: int | None = 3
    layers: list[int] | None = None
    trackers: str | list[str] | None = None


def test_none_takes_an_option_away():
    given = parse_recipe("Doc.", {"part": OptionalFields}, None, ["--tokens", "none", "--layers", "null"])["part"]
    assert given == {"tokens": None, "layers": None}
    # Where a list or a string may stand, `none` is a word: Trainer's --report_to none.
    assert parse_recipe("Doc.", {"part": OptionalFields}, None, ["--trackers", "none"])["part"] == {"trackers": "none"}


def test_help_shows_documented_names_beside_their_option(capsys):
    with pytest.raises(SystemExit):
        documented("--help")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  --rate") and "settings.optimizers.merger.lr" in line for line in lines)
    assert sum("documented: --breite" in line for line in lines) == 1
