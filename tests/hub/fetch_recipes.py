"""Loads what `push_recipes.py` pushed, by name, where the package is not installed: `fetch_recipes.py FOLDER`."""

import sys
import traceback
from pathlib import Path

import torch
import transformers
from loopback import only_loopback
from parts import use_pipeline

# Repository → what the recipe left on disk, the Auto classes that load it, and its pipelines.
REPOSITORIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "train_tokcom": ("train_tokcom", ("AutoModel", "AutoTokenizer"), ("tokcom-generation",)),
    "train_ar_baseline": ("train_ar_baseline", ("AutoModelForCausalLM", "AutoTokenizer"), ()),
    "train_vqgan": ("train_vqgan", ("AutoModel", "AutoImageProcessor"), ("vq-reconstruction", "vq-tokenize")),
    "pretrain_vlm": ("pretrain_vlm", ("AutoModelForImageTextToText", "AutoProcessor"), ()),
    "train_token_pruning": (
        "train_token_pruning",
        ("AutoModelForImageTextToText", "AutoProcessor"),
        ("pruned-image-text-to-text",),
    ),
    "pretrain_internvl": ("pretrain_internvl", ("AutoModelForImageTextToText", "AutoTokenizer"), ()),
    "train_joint_lfq": ("train_joint_lfq/model", ("AutoModelForImageTextToText", "AutoTokenizer"), ()),
    "train_joint_lfq-quantizer": ("train_joint_lfq/quantizer", ("AutoModel",), ()),
    "image_tokens": ("image_tokens", ("AutoModelForCausalLM", "AutoProcessor"), ("lfq-image-text",)),
}


def fetch(name: str, work: Path) -> dict:
    folder, auto_classes, tasks = REPOSITORIES[name]
    local, found = str(work / folder), {}
    for auto_class in auto_classes:
        load = getattr(transformers, auto_class).from_pretrained
        there, here = load(f"ada/{name}", trust_remote_code=True), load(local, trust_remote_code=True)
        found[auto_class] = type(there).__name__
        if auto_class.startswith("AutoModel"):
            theirs, ours = there.state_dict(), here.state_dict()
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in ours)
            found["weights"] = sum(value.numel() for value in ours.values())
    for task in tasks:
        named = {"task": task} if len(tasks) > 1 else {}
        results = [
            use_pipeline(task, transformers.pipeline(**named, model=place, trust_remote_code=True))
            for place in (f"ada/{name}", local)
        ]
        assert results[0] == results[1] and results[0], task
        found[task] = results[0]
    return found


if __name__ == "__main__":
    sys.modules["tokcom_hf"] = None  # type: ignore[assignment]  # importing it raises ImportError
    only_loopback()
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    fetched = {}
    for name in REPOSITORIES:
        try:
            fetched[name] = fetch(name, work)
        except Exception:
            fetched[name] = {"error": traceback.format_exc()}
    torch.save(fetched, work / "fetched.pt")
