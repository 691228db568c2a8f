"""Damaged folders of models that a recipe goes on from: it refuses them before it makes data or trains anything."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from faults_malformed_check import Case, at_command_line
from faults_malformed_files import Command, safetensors_files, write
from faults_malformed_models import save_base, save_model

# Recipe, the model it goes on from, and the option that names it.
OPTIONS = (
    ("train_vqgan", "vqgan", "--init_from"),
    ("image_tokens", "vqgan", "--image_tokenizer"),
    ("image_tokens", "llama", "--base"),
    ("expand_vocab", "llama", "--base"),
    ("train_ar_baseline", "tokcom", "--match_tokcom"),
    ("evaluate_tokcom", "tokcom", "--model"),
    ("train_token_pruning", "llava", "--base_model"),
    ("search_token_pruning", "llava", "--base_model"),
    ("eval_token_pruning", "llava", "--model"),
    ("train_joint_lfq", "internvl", "--base"),
)
MORE = {"eval_token_pruning": ("--strategy", "divprune", "--keep", "4")}
# One of each kind; faults_malformed_folders.py tries all of them on two recipes.
WEIGHTS = ("half the tensors", "a header of a terabyte", "a shape that overflows", "another type")


def cases(folder: Path) -> Iterator[Case]:
    """Writes the folders into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    damaged = {kind: list(damages(kind, folder)) for kind in {kind for _, kind, _ in OPTIONS}}
    for recipe, kind, option in OPTIONS:
        main = import_module(recipe).main
        output = ("--output_dir", str(folder / "out"), *MORE.get(recipe, ()))
        for name, path in (*damaged[kind], ("no such folder", Path("outputs/missing"))):
            run = partial(started_anew, main, [option, str(path), *output], folder / "out")
            yield Case("model folders", f"{recipe} {option}: {name}", run, (path.name,))


def started_anew(main: Callable, arguments: list[str], output: Path) -> None:
    """Runs a recipe whose output folder does not exist yet."""
    shutil.rmtree(output, ignore_errors=True)
    at_command_line(main, arguments)


def damages(kind: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields copies of a model's folder, each damaged in the way that its description says."""
    whole = (save_model if kind in ("vqgan", "tokcom") else save_base)(kind, folder / kind)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    code = {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, folder / f"{kind}-{name.replace(' ', '-')}"))

    contents = safetensors_files((whole / "model.safetensors").read_bytes())
    for name in WEIGHTS:
        write((path := copy(name)) / "model.safetensors", contents[name])
        yield name, path
    for name, text in (
        ("config.json is cut", json.dumps(config)[:60]),
        ("config.json is a list", "[]"),
        ("code for an unknown model", json.dumps(config | code)),
    ):
        ((path := copy(name)) / "config.json").write_text(text, encoding="utf-8")
        canary = os.environ.get("MALFORMED_CANARY", "canary")
        (path / "evil.py").write_text(f"import os\nos.system('touch {canary}')\n", encoding="utf-8")
        yield name, path
    ((path := copy("no weights")) / "model.safetensors").unlink()
    yield "no weights", path
    ((path := copy("weights that run a command")) / "model.safetensors").unlink()
    torch.save({"a": Command()}, path / "pytorch_model.bin")
    yield "weights that run a command", path
