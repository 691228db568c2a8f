"""Malformed input is refused in one sentence that names it: the counted corpus, and what hypothesis thinks of."""

import json
import os
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcom_hf import TokComVAE, TokComVAEConfig
from tokcom_hf.cli import parse_recipe
from tokcom_hf.cli_values import read_yaml
from tokcom_hf.data.latents import load_latents, save_latents
from tokcom_hf.data.text_files import read_json_objects
from tokcom_hf.model_folders import check_safetensors
from tokcom_hf.models.shared_image_files import open_image
from tokcom_hf.tokcom_checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
REFUSED = (ValueError, TypeError, OSError)
quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What the recipe counts, in a process that may use the network for all that its settings say."""
    output = tmp_path_factory.mktemp("malformed") / "malformed.json"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "faults_malformed.py"), "--output", str(output)]
    done = subprocess.run(command, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


def test_every_malformed_input_is_refused_in_a_sentence_and_every_good_one_taken(corpus):
    assert corpus["wrong"] == [] and corpus["faults"] == 0


def test_the_corpus_is_large_and_holds_every_kind(corpus):
    assert corpus["malformed"] >= 300
    names = [(kind, name) for kind, inputs in corpus["inputs"].items() for name in inputs]
    assert len(set(names)) == len(names) == corpus["total"]
    assert set(corpus["counts"]) == {
        "JSON lines", "text files", "images", "tokens", "prompts", "YAML", "command line", "latents", ".pt files",
        "model folders",
    }  # fmt: skip
    assert all(count["refused"] >= 10 for count in corpus["counts"].values())


def refused_or(read, *arguments, name: str | None = None):
    """The result of reading, or None where it is refused in one line that holds `name`."""
    try:
        return read(*arguments)
    except REFUSED as error:
        assert str(error) and "\n" not in str(error), error
        assert name is None or name in str(error), error


@quick
@given(st.binary(max_size=300))
def test_any_bytes_as_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for suffix, read in (
        ("jsonl", lambda path: list(read_json_objects(path))),
        ("png", open_image),
        ("pt", read_checkpoint),
        ("safetensors", check_safetensors),
    ):
        path = folder / f"any_bytes.{suffix}"
        path.write_bytes(content)
        assert refused_or(read, path, name=path.name) in (None, []) or suffix == "jsonl"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(json_values, st.integers(min_value=0, max_value=60))
def test_json_lines_are_read_whole_or_refused_by_line(tmp_path_factory, value, cut):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    line = json.dumps(value)[:cut] if cut < 60 else json.dumps(value)
    path.write_text('{"a": 1}\n' + line + "\n", encoding="utf-8")
    rows = refused_or(lambda: [row for _, row in read_json_objects(path)], name="rows.jsonl, line 2")
    # What is cut may be whole: a line of nothing but blanks, or a shorter object.
    assert rows is None or rows == [{"a": 1}] or rows == [{"a": 1}, json.loads(line)]


@dataclass
class Settings:
    """A field of each plain type."""

    number: int = 1
    rate: float = 0.1
    switch: bool = False
    name: str = "a"
    layers: list[int] | None = None


@quick
@given(st.text(alphabet="{}[]!&*:-,'\"#|>%@ \n\tabruns0123.e~<", max_size=60))
def test_yaml_is_plain_values_or_refused(text):
    value = refused_or(read_yaml, text)
    json.dumps(value, default=str)  # no cycles


@quick
@given(
    st.lists(
        st.sampled_from(
            ["--number", "--rate", "--switch", "--name", "--layers", "--run.number", "--config", "--x", "--"]
        )
        | st.text(alphabet=string.printable, max_size=8),
        max_size=5,
    )
)
def test_a_command_line_gives_values_of_the_fields_types_or_is_refused(argv):
    try:
        values = refused_or(parse_recipe, "", {"run": Settings}, None, argv)
    except SystemExit as end:  # --help
        assert end.code == 0
        return
    for name, value in (values or {"run": {}})["run"].items():
        kinds = {"number": int, "rate": float, "switch": bool, "name": str, "layers": (int, list, type(None))}
        assert isinstance(value, kinds[name]), (name, value)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return TokComVAE(
        TokComVAEConfig(
            vocab_size=20, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
            num_hidden_layers=1, chunk_size=4,
        )
    ).eval()  # fmt: skip


@quick
@given(st.lists(st.integers(min_value=-3, max_value=25), max_size=9), st.sampled_from([1, 2, 3]))
def test_ids_are_encoded_where_all_are_in_the_vocabulary(vae, ids, rank):
    tensor = torch.tensor(ids, dtype=torch.long).reshape((1,) * (rank - 1) + (-1,))
    good = rank == 2 and len(ids) > 0 and len(ids) % 4 == 0 and all(0 <= token < 20 for token in ids)
    latents = refused_or(vae.encode, tensor)
    assert (latents is not None) == good
    assert not good or latents.shape == (1, len(ids) // 4, 16)


@quick
@given(st.data())
def test_a_latents_file_with_changed_bytes_is_refused_or_gives_finite_latents(tmp_path_factory, vae, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_latents(path, [torch.zeros(2, 16)], [6], vae)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    found = refused_or(load_latents, path, vae, name=path.name)
    if found is not None:
        (latents,), (count,) = found
        assert latents.shape == (-(-count // 4), 16) and bool(latents.isfinite().all())
