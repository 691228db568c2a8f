"""The vocabulary document's code, as it is printed: only the paths of the imports are this package's."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from tests.helpers.recipes import load
from tokcom_hf import JointLFQModel, LFQExpandedModel
from tokcom_hf.cli import RecipeError, parse_recipe
from tokcom_hf.small_models.small_internvl import build_small_internvl

RECIPES = Path(__file__).parents[2] / "recipes"
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
BASIC = """
from tokcom_hf import expand_vocab_for_lfq
from transformers import InternVLForConditionalGeneration as InternVLChatModel

model = InternVLChatModel.from_pretrained("path/to/model")

expanded_model = expand_vocab_for_lfq(
    model=model,
    lfq_config={
        'output_dim': 16
    },
    embedding_init_method="random",
    freeze_original=True
)
"""
EQUIP = """
from omegaconf import OmegaConf
from tokcom_hf import equip_internvl
from transformers import InternVLForConditionalGeneration as InternVLChatModel

config = OmegaConf.load("config/vq/joint_lfq.yaml")

model = InternVLChatModel.from_pretrained(config.model.internvl_path)

equipped_model = equip_internvl(model, config)
"""
CONFIG = """
model:
  vocab_expansion:
    enabled: true
    embedding_init_method: "random"
    embedding_init_std: 0.02
    freeze_original: true
"""
ENCODE = """
from tokcom_hf import encode_lfq_codes_to_tokens

token_ids = encode_lfq_codes_to_tokens(
    lfq_codes=lfq_codes,
    start_token_id=start_token_id,
    output_dim=16
)
"""
DECODE = """
from tokcom_hf import decode_tokens_to_lfq_codes

lfq_codes = decode_tokens_to_lfq_codes(
    token_ids=token_ids,
    start_token_id=start_token_id,
    output_dim=16
)
"""
DEBUG = """
from tokcom_hf import get_lfq_token_range

print(f"vocabulary: {model.language_model.config.vocab_size}")

start_id, end_id = get_lfq_token_range(model, lfq_config)
print(f"LFQ ids: {start_id} - {end_id}")

embeddings = model.language_model.get_input_embeddings()
print(f"shape: {embeddings.weight.shape}")

if hasattr(embeddings, 'trainable_mask'):
    trainable_count = embeddings.trainable_mask.sum().item()
    total_count = embeddings.trainable_mask.numel()
    print(f"trainable: {trainable_count/total_count*100:.2f}%")

if embeddings.weight.grad is not None:
    grad_norm = embeddings.weight.grad.norm().item()
    print(f"gradient: {grad_norm}")
"""
# Not printed in the document, which is silent about the quantizer's sizes; a small one for a test.
SMALL_QUANTIZER = """
quantizer:
  output_dim: 6
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder as the document has it: `path/to/model` and `config/vq/joint_lfq.yaml`."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    base, processor = build_small_internvl(VISION, TEXT)
    for part in (base, processor):
        part.save_pretrained(folder / "path" / "to" / "model")
    path = folder / "config" / "vq" / "joint_lfq.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(CONFIG.replace("model:", "model:\n  internvl_path: path/to/model") + SMALL_QUANTIZER)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="module")
def recipe():
    return load("train_joint_lfq")


def run(code, **names):
    exec(code, names)
    return names


# ---------------------------------------------------------------------------------------------- Python
def test_basic_use(here):
    made = run(BASIC)
    base, model = made["model"], made["expanded_model"]
    assert isinstance(model, LFQExpandedModel) and model.base is base
    plain = AutoModelForImageTextToText.from_pretrained("path/to/model").get_input_embeddings().weight
    old = len(plain)
    # new vocabulary = old vocabulary + 2^output_dim, behind the old rows, on both sides.
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape == (old + 65536, 32) and torch.equal(table.weight[:old], plain)
    assert model.lfq_token_range == (old, old + 65536) and model.config.vocab_size == old + 65536
    rows = model.lfq_rows.embedding
    assert model.config.embedding_init_method == "random" and rows.std().item() == pytest.approx(0.02, rel=0.01)
    assert rows.requires_grad and not base.get_input_embeddings().weight.requires_grad


def test_joint_training_by_configuration(here):
    made = run(EQUIP)
    model = made["equipped_model"]
    assert isinstance(model, JointLFQModel) and model.base is made["model"]
    assert model.quantizer.config.output_dim == 6 and model.language_model.config.embedding_init_std == 0.02
    features = model.image_features(torch.randn(2, 3, 32, 32))
    ids = model.codes_to_ids(model.quantizer(features).codes)
    start, end = model.language_model.lfq_token_range
    assert ids.shape == (2, 4) and ids.min() >= start and ids.max() < end


def test_encoding_and_decoding(here):
    codes = torch.randint(0, 2, (2, 5, 16))
    ids = run(ENCODE, lfq_codes=codes, start_token_id=151_674)["token_ids"]
    assert ids.shape == (2, 5)
    assert ids[0, 0] == 151_674 + sum(int(bit) * 2**i for i, bit in enumerate(codes[0, 0]))
    # Codes of ±1 give the same ids.
    assert torch.equal(run(ENCODE, lfq_codes=2 * codes - 1, start_token_id=151_674)["token_ids"], ids)
    assert torch.equal(run(DECODE, token_ids=ids, start_token_id=151_674)["lfq_codes"], codes)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("which", ["expanded", "equipped"])
def test_debugging_snippet(here, capsys, which, frozen):
    if which == "expanded":
        code = BASIC if frozen else BASIC.replace("freeze_original=True", "freeze_original=False")
        model, lfq_config = run(code)["expanded_model"], {"output_dim": 16}
        inner = model
    else:
        path = Path("config/vq/joint_lfq.yaml")
        text = path.read_text()
        Path("other.yaml").write_text(
            text if frozen else text.replace("freeze_original: true", "freeze_original: false")
        )
        model = run(EQUIP.replace("config/vq/joint_lfq.yaml", "other.yaml"))["equipped_model"]
        model.set_trainable(tune_llm=False)
        inner, lfq_config = model.language_model, {"output_dim": 6}
    new, start = 2 ** lfq_config["output_dim"], inner.lfq_token_range[0]
    run(DEBUG, model=model, lfq_config=lfq_config)
    before = capsys.readouterr().out
    share = 100.0 if not frozen else 100 * new / (start + new)
    assert before.splitlines() == [
        f"vocabulary: {start + new}",
        f"LFQ ids: {start} - {start + new}",
        f"shape: torch.Size([{start + new}, 32])",
        f"trainable: {share:.2f}%",
    ]
    ids = torch.tensor([[3, 4, start, start + new - 1, 5]])
    inner(input_ids=ids, labels=ids).loss.backward()
    names = run(DEBUG, model=model, lfq_config=lfq_config)
    printed = capsys.readouterr().out
    # A line more: the norm of the gradient, all of it in the new rows where the old ones are frozen.
    assert printed.startswith(before)
    norm = float(re.search(r"gradient: (.+)", printed[len(before) :]).group(1))
    gradient = names["embeddings"].weight.grad
    assert norm > 0 and gradient[:start].any() == (not frozen)
    parts = [inner.lfq_rows.embedding.grad.norm().item()]
    if not frozen:
        parts.append(inner.base.get_input_embeddings().weight.grad.norm().item())
    assert norm == pytest.approx(math.hypot(*parts), rel=1e-4)


# ---------------------------------------------------------------------------------------------- the recipe
def parsed(recipe, *argv):
    return parse_recipe("", recipe.SECTIONS, recipe.DEFAULT_CONFIG, list(argv), recipe.TRAIN_JOINT_LFQ)


def test_the_configuration_block_as_printed(recipe, tmp_path):
    path = tmp_path / "joint_lfq.yaml"
    path.write_text(CONFIG)
    values = parsed(recipe, "--config", str(path))
    assert values["run"] == {
        "expand_vocabulary": True,
        "embedding_init_method": "random",
        "embedding_init_std": 0.02,
        "freeze_original": True,
    }
    assert values["quantizer"] == {} and values["training"] == {}
    path.write_text(CONFIG.replace("true", "false").replace('"random"', '"zeros"').replace("0.02", "0.5"))
    values = parsed(recipe, "--config", str(path))
    assert list(values["run"].values()) == [False, "zeros", 0.5, False]
    path.write_text(CONFIG.replace("embedding_init_std", "embedding_std"))
    with pytest.raises(RecipeError, match="embedding_std"):
        parsed(recipe, "--config", str(path))


@pytest.mark.parametrize("prefix", ["", "model.vocab_expansion."])
def test_the_configuration_block_as_flags(recipe, prefix):
    flags = {
        "enabled": "false",
        "embedding_init_method": "zeros",
        "embedding_init_std": "0.5",
        "freeze_original": "false",
    }
    words = [word for name, value in flags.items() for word in (f"--{prefix}{name}", value)]
    run = parsed(recipe, "--internvl_path", "path/to/model", *words)["run"]
    assert run["base"] == "path/to/model" and run["expand_vocabulary"] is False and run["freeze_original"] is False
    assert run["embedding_init_method"] == "zeros" and run["embedding_init_std"] == 0.5


def test_help_shows_the_documented_names(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    printed = capsys.readouterr().out
    for option, name in (
        ("base", "model.internvl_path"),
        ("expand_vocabulary", "model.vocab_expansion.enabled"),
        ("embedding_init_method", "model.vocab_expansion.embedding_init_method"),
        ("embedding_init_std", "model.vocab_expansion.embedding_init_std"),
        ("freeze_original", "model.vocab_expansion.freeze_original"),
    ):
        assert re.search(rf"--{option} .*documented: .*{re.escape(name)}", printed), name


@pytest.mark.parametrize("change", [None, "enabled", "freeze_original"])
def test_the_recipe_runs_by_the_documented_file(here, recipe, tmp_path, capsys, change):
    """The same file as `equip_internvl` reads; one of its switches turned off at a time."""
    path = tmp_path / "joint_lfq.yaml"
    path.write_text(Path("config/vq/joint_lfq.yaml").read_text().replace(f"{change}: true", f"{change}: false"))
    sizes = {
        "train_images": 8, "eval_images": 4, "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "threads": 1, "quantizer_start_steps": 2, "save_strategy": "no", "disable_tqdm": "true",
    }  # fmt: skip
    words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    out = tmp_path / "out"
    results = recipe.main(["--config", str(path), "--output_dir", str(out), *words])
    printed = capsys.readouterr().out
    assert results["steps"] == 2 and results == json.loads((out / "results.json").read_text())
    assert AutoModel.from_pretrained(out / "quantizer").config.output_dim == 6
    old = AutoModelForImageTextToText.from_pretrained("path/to/model").get_input_embeddings().weight
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    if change == "enabled":
        plain = AutoModelForImageTextToText.from_pretrained(out / "model")
        assert torch.equal(plain.get_input_embeddings().weight, old)
        assert results["parameters"]["new rows"] == 0 and "generation_loss" not in results["after"]
        assert "generation loss" not in printed and "understanding KL" in printed and "draws no images" in card
        return
    model = AutoModel.from_pretrained(out / "model")
    assert "generation loss" in printed and model.config.embedding_init_method == "random"
    assert torch.equal(model.base.get_input_embeddings().weight, old) == (change != "freeze_original")
    assert ("rows unchanged" in card) == (change != "freeze_original")


# ---------------------------------------------------------------------------------------------- configs/paper
# Where each documented value is in configs/paper/train_joint_lfq.yaml.
DOCUMENTED = {
    "run.quantizer_input": "vision",
    "run.expand_vocabulary": True,
    "run.embedding_init_method": "random",
    "run.embedding_init_std": 0.02,
    "run.freeze_original": True,
    "quantizer.output_dim": 16,
    "quantizer.variant": "transformer",
    "quantizer.hidden_size": 1024,
    "quantizer.num_hidden_layers": 16,
    "quantizer.num_attention_heads": 16,
    "quantizer.qk_norm": True,
    "quantizer.group_norm": False,
    "training.learning_rate": 1e-4,
    "training.adam_beta1": 0.9,
    "training.adam_beta2": 0.95,
    "training.weight_decay": 0.05,
    "training.generation_weight": 1.0,
    "training.understanding_weight": 25.0,
    "training.reconstruction_weight": 0.0,
    "training.entropy_weight": 0.0,
    "training.entropy_weight_end": 0.0,
    "training.quantizer_start_steps": 0,
    "training.quantizer_start_images": 0,
    "training.caption_drop": 0.1,
}


@pytest.mark.parametrize("option", DOCUMENTED)
def test_paper_holds_the_documented_value(recipe, option):
    path = RECIPES / "configs" / "paper" / "train_joint_lfq.yaml"
    values = parsed(recipe, "--config", str(path))
    section, _, field = option.partition(".")
    assert values[section][field] == DOCUMENTED[option]


def test_paper_trains_by_the_documented_loss_alone(here, recipe, tmp_path):
    """A step of configs/paper on a small base: the sum of the two documented losses, from bits as they were drawn."""
    path = RECIPES / "configs" / "paper" / "train_joint_lfq.yaml"
    small = {
        "output_dim": 6,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    sizes = {f"quantizer.{name}": value for name, value in small.items()} | {
        "train_images": 8, "eval_images": 4, "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1,
        "threads": 1, "save_strategy": "no", "eval_strategy": "no", "bf16": "false", "dtype": "float32",
        "disable_tqdm": "true", "prompt": "<image> {question}", "caption_prompt": "{caption}",
    }  # fmt: skip
    words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    out = tmp_path / "out"
    results = recipe.main(
        ["--config", str(path), "--internvl_path", "path/to/model", "--output_dir", str(out), *words]
    )
    assert results["start_error"] is None and results["quantizer_input"] == "vision"
    assert AutoModel.from_pretrained(out / "quantizer").config.input_size == 64
    assert "before its projector" in (out / "quantizer" / "README.md").read_text(encoding="utf-8")
    log = (out / "logs" / "training.log").read_text()
    values = {name: float(value) for name, value in re.findall(r"([\w/]+): ([-\d.e]+)", log)}
    expected = values["joint/generation_loss"] + 25 * values["joint/understanding_loss"]
    assert values["loss"] == pytest.approx(expected, rel=1e-3)
