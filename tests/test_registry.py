"""Registration: nothing is imported by it, everything is found after it, in any order and among threads."""

import copy
import os
import pickle
import statistics
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import tokcom_hf
from tokcom_hf.lazy import LazyMapping, when_imported
from tokcom_hf.registry import MODELS, PIPELINES, register_all


def run(code: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


IMPORT_TIMES = """
import os, sys, time
import torch, transformers
from transformers import PreTrainedModel
before = set(sys.modules)
for _ in range(9):
    # A child has imported what its parent has, and nothing of what its siblings import.
    if os.fork() == 0:
        start = time.process_time()
        import tokcom_hf
        print(time.process_time() - start, flush=True)
        print([name for name in sys.modules if name.startswith(("tokcom_hf.models", "transformers.pipelines"))], flush=True)
        os._exit(0)
    os.wait()
import tokcom_hf
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
for row in tokcom_hf.registry.PIPELINES:
    assert PIPELINE_REGISTRY.check_task(row.task)[1]["impl"].__name__ == row.pipeline
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="compares imports in forked processes")
def test_the_import_costs_at_most_015_seconds_over_transformers_own():
    lines = run(IMPORT_TIMES).splitlines()
    times, imported = [float(line) for line in lines[::2]], lines[1::2]
    assert len(times) == 9 and set(imported) == {"[]"}
    assert statistics.median(times) <= 0.15, times


EVERY_WAY_IN = """
import threading
import transformers
{first}
failures = []
def attempt(code):
    try:
        exec(code, {{}})
    except BaseException as error:
        failures.append((code, repr(error)))
codes = ["import tokcom_hf; tokcom_hf.LFQExpandedModel", "from transformers import pipeline, AutoModel, AutoProcessor",
         "import tokcom_hf.models.pipeline_lfq", "import tokcom_hf.models.modeling_pruned_vlm",
         "import tokcom_hf; from transformers import AutoConfig; AutoConfig.for_model('tokcom_pruned_vlm')"]
threads = [threading.Thread(target=attempt, args=(code,)) for code in codes * 2]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failures, failures
from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY
from tokcom_hf.registry import MODELS, PIPELINES
for row in PIPELINES:
    assert PIPELINE_REGISTRY.check_task(row.task)[1]["impl"].__name__ == row.pipeline
for row in MODELS:
    assert AutoModel._model_mapping[type(AutoConfig.for_model(row.model_type))].__name__ == row.model
"""


@pytest.mark.parametrize("first", ["from transformers import pipeline", "pass"])
def test_every_order_of_imports_and_threads_that_import_at_once(first):
    run(EVERY_WAY_IN.format(first=first))


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.model)
def test_auto_classes_find_every_model_and_its_code_travels(row):
    config = AutoConfig.for_model(row.model_type)
    assert type(config) is getattr(tokcom_hf, row.config) and type(config).model_type == row.model_type
    assert type(config)._auto_class == "AutoConfig"
    model_class = getattr(tokcom_hf, row.model)
    assert model_class._auto_class == row.auto_classes[0]
    for name in row.auto_classes:
        mapping = getattr(transformers, name)._model_mapping
        assert type(config) in mapping and mapping[type(config)] is model_class
        assert model_class in mapping._extra_content.values()


def test_processors_and_pipelines_are_found():
    assert IMAGE_PROCESSOR_MAPPING[tokcom_hf.VQGANConfig] == {"pil": tokcom_hf.VQGANImageProcessor}
    assert PROCESSOR_MAPPING[tokcom_hf.LFQExpandedConfig] is tokcom_hf.LFQProcessor
    assert tokcom_hf.VQGANImageProcessor._auto_class == "AutoImageProcessor"
    assert tokcom_hf.LFQProcessor._auto_class == "AutoProcessor"
    for row in PIPELINES:
        _, task, _ = PIPELINE_REGISTRY.check_task(row.task)
        assert task["impl"].__name__ == row.pipeline and task["type"] == row.kind and "default" not in task
        assert {auto_class.__name__ for auto_class in task["pt"]} >= {"AutoModel"}
        assert row.task in PIPELINE_REGISTRY.get_supported_tasks()


def test_registering_twice_changes_nothing_and_another_class_takes_precedence():
    # Other tests of this process may have registered models of their own.
    before = dict(MODEL_MAPPING._extra_content)
    register_all()
    assert MODEL_MAPPING._extra_content == before
    assert len({getattr(tokcom_hf, row.config) for row in MODELS} & set(before)) == len(MODELS)

    class Other(tokcom_hf.VQGAN):
        pass

    transformers.AutoModel.register(tokcom_hf.VQGANConfig, Other, exist_ok=True)
    try:
        assert MODEL_MAPPING[tokcom_hf.VQGANConfig] is Other
    finally:
        transformers.AutoModel.register(tokcom_hf.VQGANConfig, tokcom_hf.VQGAN, exist_ok=True)


def test_mappings_can_be_pickled_and_copied():
    for mapping in (pickle.loads(pickle.dumps(CONFIG_MAPPING)), copy.deepcopy(CONFIG_MAPPING)):
        assert mapping["tokcom"] is tokcom_hf.TokComConfig
    assert pickle.loads(pickle.dumps(MODEL_MAPPING))[tokcom_hf.VQGANConfig] is tokcom_hf.VQGAN
    assert pickle.loads(pickle.dumps(tokcom_hf.TokComConfig())).to_dict() == tokcom_hf.TokComConfig().to_dict()


def test_a_lazy_mapping_reads_like_a_dictionary_and_imports_an_entry_once_it_is_asked_for():
    asked = []

    class Key:
        pass

    def load(key, value):
        asked.append(value)
        return key, value

    mapping = LazyMapping({"held": 0})
    mapping.defer("late", lambda: load("late", 1))
    mapping.defer(f"{Key.__module__}.{Key.__qualname__}", lambda: load(Key, 2))
    assert "late" in mapping and Key in mapping and "other" not in mapping and len(mapping) == 3 and not asked
    assert mapping.get("other") is None and mapping["held"] == 0 and not asked
    assert mapping[Key] == 2 and mapping[Key] == 2 and asked == [2]
    assert mapping.copy() == {"held": 0, "late": 1, Key: 2} and asked == [2, 1]
    mapping.defer("late", lambda: load("late", 3))
    assert mapping["late"] == 1 and len(mapping) == 3
    mapping["late"] = 4
    assert dict(mapping) == {"held": 0, "late": 4, Key: 2}
    del mapping[Key], mapping["late"]
    assert list(mapping.items()) == [("held", 0)]
    with pytest.raises(KeyError):
        mapping["late"]


def test_a_callback_waits_for_its_module(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    when_imported("waited_for", lambda module: seen.append((module.value, module.__loader__)))
    assert not seen
    import waited_for

    assert seen == [(1, waited_for.__spec__.loader)] and "waited_for" in waited_for.__loader__.path
    when_imported("waited_for", lambda module: seen.append(module))
    assert seen[1] is waited_for
