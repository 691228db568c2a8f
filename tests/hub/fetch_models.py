"""Loads what `push_models.py` pushed, by name and revision, where the package is not installed: `fetch_models.py OUT`."""

import sys
import traceback

import torch
import transformers
from loopback import only_loopback
from parts import use_part, use_pipeline
from rows import ROWS, outputs, slug

sys.modules["tokcom_hf"] = None  # type: ignore[assignment]  # importing it raises ImportError
only_loopback()
torch.set_num_threads(1)


def fetch(row) -> dict:
    name, found = f"ada/{slug(row.name)}", {}
    auto_class = getattr(transformers, row.auto_class)
    for revision in ("v1", "main"):
        model = auto_class.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        found[revision] = outputs(row, model)
    for part in row.parts:
        loaded = getattr(transformers, part).from_pretrained(name, revision="v1", trust_remote_code=True)
        found[part] = use_part(loaded)
    if row.composite:
        found["reference"] = outputs(
            row, auto_class.from_pretrained(f"{name}-reference", trust_remote_code=True).eval()
        )
    found["pipelines"] = {}
    for task in row.tasks:
        # A folder with one pipeline need not be told which.
        named = {"task": task} if len(row.tasks) > 1 else {}
        pipe = transformers.pipeline(**named, model=f"{name}-folder", trust_remote_code=True)
        found["pipelines"][task] = use_pipeline(task, pipe)
    return found


results = {}
for row in ROWS:
    try:
        results[row.name] = fetch(row)
    except Exception:
        results[row.name] = {"error": traceback.format_exc()}
torch.save(results, sys.argv[1])
