"""Model cards against what the Hub accepts, offline: metadata, results that a machine can read, snippets that run."""

import ast
import json
import math
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.inference._generated import types as hub_types
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import PIPELINE_REGISTRY

from tokcom_hf import LFQConfig, LFQExpandedConfig, TokComConfig, TokComVAEConfig, VQGANConfig
from tokcom_hf.cards import (
    EMBEDDED_TEXT,
    IMAGES,
    SCENES,
    CardDataset,
    card_dataset,
    flat_numbers,
    hub_id,
    template_path,
    write_model_card,
)
from tokcom_hf.registry import PIPELINES

ROOT = Path(__file__).parents[1]
# The Hub's tasks that huggingface_hub and transformers know, without the package's own.
TASKS = {name.replace("_", "-") for _, name, _ in pkgutil.iter_modules(hub_types.__path__)} - {
    "base",
    "chat-completion",
}
TASKS |= {task for task in PIPELINE_REGISTRY.get_supported_tasks()} - {row.task for row in PIPELINES}
TASKS |= {"image-text-to-text"}
LICENSES = {"mit", "apache-2.0", "other"}
METADATA = {
    "library_name": str, "license": str, "tags": list, "pipeline_tag": str, "base_model": str, "datasets": list,
    "language": str, "model-index": list,
}  # fmt: skip


def check_card(text: str, model_id: str) -> dict:
    """The metadata of a card that the Hub would take; an AssertionError says what it would refuse."""
    assert len(text.encode()) < 2**20
    block = REGEX_YAML_BLOCK.search(text)
    data = yaml.safe_load(block.group(2))
    assert set(data) <= set(METADATA) and {"library_name", "license", "tags", "pipeline_tag"} <= set(data), data
    assert all(isinstance(data[name], METADATA[name]) for name in data), data
    # Nothing that JSON, and so the Hub's API, cannot hold.
    json.dumps(data, allow_nan=False)
    assert data["library_name"] == "transformers" and data["license"] in LICENSES
    assert data["pipeline_tag"] in TASKS, data["pipeline_tag"]
    tags = [*data["tags"], *data.get("datasets", [])]
    assert len(set(tags)) == len(tags) and all(isinstance(tag, str) and len(tag) <= 64 for tag in tags)
    for name in [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]:
        validate_repo_id(name)
    if "language" in data:
        assert re.fullmatch(r"[a-z]{2,3}", data["language"])
    if "model-index" in data:
        name, results = model_index_to_eval_results(data["model-index"])
        assert name == model_id.rpartition("/")[2] and results
        assert all(isinstance(one.metric_value, float) and math.isfinite(one.metric_value) for one in results)
        assert {one.task_type for one in results} == {data["pipeline_tag"]}
        again = model_index_to_eval_results(eval_results_to_model_index(name, results))[1]
        assert sorted(map(repr, again)) == sorted(map(repr, results))
        assert ModelCard(text).data.eval_results == results
    assert "this/folder" not in text and "(folder" not in text
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        ast.parse(code)
        assert f'"{model_id}"' in code
    return data


SECONDS = {"training": 3.0, "pretraining": 1.0}
TRAINING = SimpleNamespace(
    train_batch_size=4, learning_rate=1e-3, seed=0, perceptual="none", perceptual_weight=1.0, adversarial_weight=0.1,
    gan_loss="hinge", caption_drop=0.1, generation_weight=1.0, understanding_weight=25.0, new_rows_learning_rate=None,
    tune_llm=False, entropy_weight=0.1, entropy_weight_end=0.01,
)  # fmt: skip
JOINT = {
    "generation_loss": 2.0, "generation_chance": 5.5, "generation_loss_no_caption": 2.5, "entropy": 3.0,
    "quantized_kl": 0.1, "continuous_kl": 0.05, "tokens": 100, "bit_mean_min": 0.4, "bit_mean_max": 0.6, "dead_bits": 0,
    "flip_rate": [0.1, 0.2], "mean_correlation": 0.1, "max_correlation": 0.3, "active": 9, "utilization": 0.1,
    "utilization_ceiling": 0.3, "perplexity": 7.0, "reconstruction_loss": 0.2, "lfq_mass_first": 0.01,
}  # fmt: skip
RESULTS = {
    "base": "outputs/small_internvl", "held_out_images": 8, "held_out_captions": 8, "data": "procedural scenes",
    "before": JOINT, "after": JOINT, "steps": 5, "train_images": 20, "seconds": SECONDS, "seed": 0, "minutes": 0.1,
    "parameters": {"quantizer": 1000}, "codes": 16, "generation_loss": 2.0,
    "drawn": {"generated": {"shape_and_colour": 0.5, "place": 0.4}},
}  # fmt: skip
IMAGE_METRICS = {
    "active": 9, "utilization": 0.5, "normalized_entropy": 0.9, "perplexity": 7.0, "psnr": 20.0, "ssim": 0.8,
    "ms_ssim": float("nan"), "runtime": 3.0,
}  # fmt: skip
TOKCOM = {"parameters": {"VAE": 10, "denoiser": 20}, "metrics": {"token_accuracy": 0.99}, "data": "English"}
TOKCOM |= {"samples": {"generated": "a\nb", "conditional": "c"}, "measured": {"token_accuracy": 0.99}}
ACCURACY = {"all": 0.5, "count": 0.4}
MODE = {"accuracy": ACCURACY, "flops_ratio": 0.5, "sequence_kept": 0.6, "vision_tokens_per_layer": [16.0, 8.0]}
LFQ = LFQConfig(output_dim=4, num_tokens=4)
EXPANDED = LFQExpandedConfig(output_dim=4, lfq_start_token_id=50)
CARDS = {
    "tokcom": {"pipeline_tag": "text-generation", "name": "TokCom", "config": TokComConfig().to_dict(),
               "dataset": EMBEDDED_TEXT, **TOKCOM},
    "tokcom vae": {"pipeline_tag": "feature-extraction", "name": "TokComVAE", "config": TokComVAEConfig().to_dict(),
                   "dataset": EMBEDDED_TEXT, **TOKCOM},
    "vqgan": {"pipeline_tag": "image-to-image", "config": VQGANConfig(), "training": TRAINING, "dataset": IMAGES,
              "results": RESULTS | {"metrics": IMAGE_METRICS, "parameters": 1000}, "measured": IMAGE_METRICS},
    "image_tokens": {"pipeline_tag": "text-to-image", "config": EXPANDED, "results": RESULTS, "dataset": SCENES,
                     "run": SimpleNamespace(guidance_scale=3.0, caption_drop=0.1), "measured": {"loss": 2.0},
                     "base": "org/language-model"},
    "joint_lfq": {"pipeline_tag": "text-generation", "quantizer": LFQ, "language_model": EXPANDED, "results": RESULTS,
                  "training": TRAINING, "dataset": SCENES, "measured": JOINT, "base": "recipes"},
    "lfq_quantizer": {"pipeline_tag": "feature-extraction", "quantizer": LFQ, "language_model": EXPANDED,
                      "results": RESULTS, "training": TRAINING, "dataset": SCENES, "measured": JOINT},
    "small_vlm": {"pipeline_tag": "image-text-to-text", "name": "LLaVA", "parameters": 1000, "dataset": SCENES,
                  "results": {"accuracy": ACCURACY, "scenes": {}, "seed": 0}, "measured": {"accuracy": ACCURACY}},
    "ar_baseline": {"pipeline_tag": "text-generation", "training": TRAINING, "data": "English",
                    "config": SimpleNamespace(num_hidden_layers=2, hidden_size=8), "measured": {"loss": 2.0},
                    "dataset": CardDataset("org/corpus", "org/corpus", "part"),
                    "budget": {"parameters": 10, "steps": 5, "tokens": 100, "flops": 1e9, "held_out_loss": 2.0,
                               "held_out_perplexity": 7.4, "matched": None}},
    "token_pruning": {"pipeline_tag": "image-text-to-text", "base_model": "org/vlm", "base": "org/vlm", "questions": 9,
                      "modes": {"hard": MODE}, "dataset": card_dataset(SCENES, file="my questions.jsonl"),
                      "config": {"token_merger": None, "layer_pruner": None, "strategy": "fastv", "keep": 4},
                      "measured": {"hard": {"accuracy": 0.5}}},
}  # fmt: skip


@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("repo_id", ["user/some-model", None])
def test_the_hub_accepts_every_card(kind, repo_id, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = dict(CARDS[kind])
    folder = tmp_path / "some_folder"
    folder.mkdir()
    path = write_model_card(folder, kind.split()[0], tags=["a-tag", "tokcom_hf"], repo_id=repo_id, **values)
    text = path.read_text(encoding="utf-8")
    data = check_card(text, repo_id or "some_folder")
    assert data["pipeline_tag"] == values["pipeline_tag"]
    assert data.get("language") == values["dataset"].language
    assert data.get("datasets") == ([values["dataset"].id] if values["dataset"].public else None)
    # A folder of this machine is no base model to anybody else.
    assert data.get("base_model") == (values["base"] if "/" in values.get("base", "") else None)
    found = {one.metric_type: one.metric_value for one in ModelCard(text).data.eval_results}
    expected = {name: value for name, value in flat_numbers(values["measured"]).items() if math.isfinite(value)}
    assert found == {name: value for name, value in expected.items() if name != "runtime"} and "runtime" not in found


def test_every_template_is_covered():
    assert {kind.split()[0] for kind in CARDS} == {path.stem for path in template_path("tokcom").parent.glob("*.md")}


def test_every_recipe_writes_a_task_of_the_hubs_own_and_its_repository():
    calls = 0
    for path in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "tokcom_hf").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_model_card":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                constants = [n.value for n in ast.walk(given["pipeline_tag"]) if isinstance(n, ast.Constant)]
                assert {"pipeline_tag", "tags"} <= set(given) and set(constants) <= TASKS, path
                calls += 1
    assert calls >= 9


def test_the_checker_refuses_what_the_hub_refuses(tmp_path):
    path = write_model_card(tmp_path, "tokcom", tags=[], **CARDS["tokcom"])
    text = path.read_text(encoding="utf-8")
    check_card(text, tmp_path.name)
    for right, wrong in (
        ("pipeline_tag: text-generation", "pipeline_tag: text-compression"),
        ("license: mit", "license: [mit]"),
        ("library_name: transformers", "library: transformers"),
        ("value: 0.99", "value: .nan"),
        (f'"{tmp_path.name}"', '"this/folder"'),
    ):
        assert right in text
        with pytest.raises((AssertionError, ValueError)):
            check_card(text.replace(right, wrong), tmp_path.name)


def test_data_and_base_models_as_the_hub_names_them(tmp_path):
    assert card_dataset(SCENES) is SCENES
    # The language is that of the package's own texts; of others' nothing is known.
    assert EMBEDDED_TEXT.language == SCENES.language == "en" and IMAGES.language is None
    assert card_dataset(SCENES, file="rows.jsonl").language is None is card_dataset(EMBEDDED_TEXT, "org/data").language
    assert card_dataset(SCENES, "org/data", "part") == CardDataset("org/data", "org/data", "part")
    assert card_dataset(SCENES, file="/some where/My Data.jsonl") == CardDataset(
        "my-data", "My Data.jsonl", public=False
    )
    assert hub_id("org/model") == "org/model" and hub_id("gpt2") == "gpt2"
    assert hub_id(None) is None and hub_id(tmp_path) is None and hub_id("/no/such/folder") is None
    assert hub_id("../x") is None and hub_id("a/b/c") is None
    assert flat_numbers({"a": {"b": 1, "c": "x"}, "d": True, "e": [1], "f": 2.5}) == {"a_b": 1.0, "f": 2.5}
