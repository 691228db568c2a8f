"""Pushes every row to the hub: `push_models.py FOLDER`, with HF_ENDPOINT and HF_TOKEN set.

A row becomes two repositories: `ada/<slug>` by `push_to_hub` of model and tokenizer or processor, tagged `v1`, with other
weights pushed to `main` after that; `ada/<slug>-folder` by `push_folder` of a folder with its card.
"""

import sys
import traceback
from pathlib import Path

import torch
from huggingface_hub import HfApi
from loopback import only_loopback
from parts import use_pipeline
from rows import ROWS, build_expanded, build_pruned, filled, outputs, slug
from transformers import pipeline

from tokcom_hf.hub import push_folder

CARD = """---
license: mit
library_name: transformers
tags: [tokcom_hf]
---

# {name}, “tiny”
"""
only_loopback()
torch.set_num_threads(1)
work, api, results = Path(sys.argv[1]), HfApi(), {}


def push(row) -> dict:
    name, model = f"ada/{slug(row.name)}", row.build()
    first = outputs(row, model)
    folder = work / slug(row.name)
    model.save_pretrained(folder)
    if row.make_part is not None:
        row.make_part(model).save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(name=row.name), encoding="utf-8")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"a run's own")
    commit = push_folder(folder, f"{name}-folder")
    pipes = {task: use_pipeline(task, pipeline(task, model=str(folder))) for task in row.tasks}
    model.push_to_hub(name)
    if row.make_part is not None:
        row.make_part(model).push_to_hub(name)
    api.create_tag(name, tag="v1")
    second = filled(row.build(), seed=7)
    # As transformers documents it: saving to a folder and pushing it in one call.
    second.save_pretrained(work / f"{slug(row.name)}-second", push_to_hub=True, repo_id=name)
    found = {"v1": first, "main": outputs(row, second), "commit": commit, "folder": str(folder), "pipelines": pipes}
    return found | {"second": str(work / f"{slug(row.name)}-second")}


def push_reference(row, build) -> dict:
    """A base model on the hub, and a model that refers to it."""
    base = row.build().base
    base.push_to_hub(f"ada/{slug(row.name)}-base", private=True)
    model = build(f"ada/{slug(row.name)}-base")
    model.push_to_hub(f"ada/{slug(row.name)}-reference")
    return {"outputs": outputs(row, model)}


for row in ROWS:
    try:
        results[row.name] = push(row)
        if row.composite:
            build = build_pruned if row.model == "PrunedVLM" else build_expanded
            results[row.name]["reference"] = push_reference(row, build)
    except Exception:
        results[row.name] = {"error": traceback.format_exc()}
torch.save(results, work / "pushed.pt")
