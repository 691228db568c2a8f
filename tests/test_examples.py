"""The Python examples of README, in both languages, and of the pages: each runs, and prints what it says it prints.

Every block runs by itself in a folder that holds tiny random models under the names that the recipes give theirs. Names of
the Hub and sizes are replaced by tiny ones; nothing else is changed.
"""

import contextlib
import importlib.util
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tokcom_hf import LFQConfig, LFQExpandedModel, LFQQuantizer
from tokcom_hf.small_models.small_internvl import build_small_internvl

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHOWN = "# → "  # begins the lines of an example that show what it prints
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]
# What a test replaces: models of the Hub, and sizes that ask for more than a tiny model has.
TINY = {
    "llava-hf/llava-1.5-7b-hf": "outputs/small_vlm",
    "Qwen/Qwen3-0.6B": "outputs/small_llama",
    "keep=16": "keep=4",
    '"output_dim": 16': '"output_dim": 4',
}


def tiny_models():
    """The module that builds tiny models for the benchmark of pipelines."""
    path = ROOT / "recipes" / "benchmarks" / "pipeline_threads.py"
    spec = importlib.util.spec_from_file_location("tiny_models_of_examples", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_joint_lfq(folder: Path) -> None:
    """What recipes/train_joint_lfq.py leaves: a quantizer, and an InternVL with LFQ ids."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, processor = build_small_internvl(
        {"image_size": 32, "patch_size": 8, **shape}, {"num_key_value_heads": 2, **shape}
    )
    model = LFQExpandedModel.from_base(base, 4, "mean", tokenizer=processor.tokenizer)
    model.save_pretrained(folder / "model", include_base=True)
    processor.tokenizer.save_pretrained(folder / "model")
    quantizer = LFQConfig(input_size=32, llm_hidden_size=32, num_tokens=4, output_dim=4, **shape)
    LFQQuantizer(quantizer).save_pretrained(folder / "quantizer")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder as it is after the recipes of the examples have run."""
    home = tmp_path_factory.mktemp("examples")
    outputs = home / "outputs"
    tiny = tiny_models()
    set_seed(0)
    tiny.build_tokcom(outputs / "tokcom")
    tiny.build_vqgan(outputs / "train_vqgan")
    tiny.build_lfq(outputs / "image_tokens")
    llava, processor = tiny.tiny_llava()
    llava.save_pretrained(outputs / "small_vlm")
    processor.save_pretrained(outputs / "small_vlm")
    llama = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(llama).save_pretrained(outputs / "small_llama")
    processor.tokenizer.save_pretrained(outputs / "small_llama")
    build_joint_lfq(outputs / "joint_lfq")
    (home / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "scene.png", home / "docs")
    return home


def shown(code: str) -> list[str]:
    return [line.removeprefix(SHOWN) for line in code.splitlines() if line.startswith(SHOWN)]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_and_prints_what_it_says(code, home, monkeypatch):
    monkeypatch.chdir(home)
    for name, tiny in TINY.items():
        code = code.replace(name, tiny)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    if expected := shown(code):
        # Trained models write other words than tiny random ones, in the same form.
        printed = output.getvalue().splitlines()
        assert [form(line) for line in printed] == [form(line) for line in expected], printed


def form(line: str) -> str:
    """A printed line without its words and numbers: brackets, strings, percent signs."""
    bare = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'", line)
    return re.sub(r"[^\[\](){}'%]", "", bare)


def test_every_example_of_readme_shows_its_output():
    for page in PAGES[:2]:
        examples = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert len(examples) == 4 and all(shown(code) for code in examples), page.name
