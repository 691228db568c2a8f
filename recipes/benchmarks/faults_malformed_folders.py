"""Malformed model folders, and names of folders that do not exist, at the command line."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import analyze_codebook
import infer_tokcom
import torch
from faults_malformed_check import Case, at_command_line
from faults_malformed_files import Command, safetensors_files, write
from faults_malformed_models import save_model
from safetensors.torch import load_file

from tokcom_hf import VQGAN, TokComModel


def cases(folder: Path) -> Iterator[Case]:
    """Writes the folders into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from folders(folder / "models")
    yield from names(folder)


def folders(folder: Path) -> Iterator[Case]:
    """Damaged folders of a VQGAN and of a TokCom model, at the command line; whole ones through `from_pretrained`."""
    good = {kind: save_model(kind, folder / kind) for kind in ("vqgan", "tokcom")}
    classes = {"vqgan": VQGAN, "tokcom": TokComModel}
    commands: dict[str, Callable[[Path], Any]] = {
        "vqgan": lambda path: at_command_line(
            analyze_codebook.main,
            ["--model_path", str(path), "--num_images", "2", "--output_dir", str(folder / "out")],
        ),
        "tokcom": lambda path: at_command_line(
            infer_tokcom.main, ["--model", str(path), "--mode", "generate", "--num_chunks", "1", "--num_steps", "1"]
        ),
    }
    for kind, whole in good.items():
        yield Case("model folders", f"{kind}: good", partial(classes[kind].from_pretrained, whole), fine=True)
        damaged = safetensors_files((whole / "model.safetensors").read_bytes())
        for number, (name, content) in enumerate(damaged.items()):
            copy = Path(shutil.copytree(whole, folder / f"{kind}_weights_{number}"))
            write(copy / "model.safetensors", content)
            yield Case("model folders", f"{kind}: {name}", partial(commands[kind], copy), (copy.name,))
        config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
        for number, (name, content) in enumerate(configurations(config, kind).items()):
            copy = Path(shutil.copytree(whole, folder / f"{kind}_config_{number}"))
            (copy / "config.json").write_text(content, encoding="utf-8")
            (copy / "evil.py").write_text(
                f"import os\nos.system('touch {os.environ.get('MALFORMED_CANARY', 'canary')}')\n", encoding="utf-8"
            )
            yield Case("model folders", f"{kind}: {name}", partial(commands[kind], copy), (copy.name,))
        yield from shards(kind, whole, folder, commands[kind])


def configurations(config: dict[str, Any], kind: str) -> dict[str, str]:
    """Texts of config.json, by description, that do not fit the weights in the folder."""
    width = "base_channels" if kind == "vqgan" else "max_chunks"
    inner = {} if kind == "vqgan" else {"vae": config["vae"] | {"hidden_size": 10**9}}
    layers = {} if kind == "vqgan" else {"denoiser": config["denoiser"] | {"num_hidden_layers": 10**9}}
    code = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    changed = {
        "config.json is a list": [],
        "config.json is a text": "a",
        "config.json is empty": {},
        "another model_type": config | {"model_type": "llama"},
        "an unknown model_type": config | {"model_type": "no_such_model"},
        "a model_type that is a number": config | {"model_type": 3},
        "code for an unknown model": config | {"model_type": "evil", "auto_map": code},
        "a width that is a text": config | {width: "wide"},
        "a width that is negative": config | {width: -8},
        "a width of a billion": config | ({width: 10**9} if kind == "vqgan" else inner),
        "a billion layers": config | ({"num_res_blocks": 10**9} if kind == "vqgan" else layers),
    }  # fmt: skip
    if kind == "vqgan":
        changed |= {"a codebook of a trillion": config | {"codebook_size": 10**12}}
        changed |= {"a downsample factor of zero": config | {"downsample_factor": 0}}
    texts = {name: json.dumps(value) for name, value in changed.items()}
    return texts | {"config.json is cut": json.dumps(config)[:100], "config.json holds nothing": ""}


def shards(kind: str, whole: Path, folder: Path, run: Callable[[Path], Any]) -> Iterator[Case]:
    """Sharded weights whose index does not fit them, pickled weights, and no weights."""
    tensors = load_file(whole / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    indices: dict[str, str] = {
        "a missing part": json.dumps(index | {"weight_map": dict.fromkeys(tensors, "model-9.safetensors")}),
        "an index without a map": json.dumps({"metadata": {}}),
        "an index that is a list": "[]",
        "an index that is cut": json.dumps(index)[:60],
        "a part outside the folder": json.dumps(index | {"weight_map": dict.fromkeys(tensors, "../../etc/passwd")}),
        "a part that is a number": json.dumps(index | {"weight_map": dict.fromkeys(tensors, 3)}),
    }
    for number, (name, content) in enumerate(indices.items()):
        copy = Path(shutil.copytree(whole, folder / f"{kind}_index_{number}"))
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
        (copy / "model.safetensors.index.json").write_text(content, encoding="utf-8")
        yield Case("model folders", f"{kind}: {name}", partial(run, copy), (copy.name,))
    copy = Path(shutil.copytree(whole, folder / f"{kind}_pickled"))
    (copy / "model.safetensors").unlink()
    torch.save({"a": Command()}, copy / "pytorch_model.bin")
    yield Case("model folders", f"{kind}: weights that run a command", partial(run, copy), (copy.name,))
    copy = Path(shutil.copytree(whole, folder / f"{kind}_no_weights"))
    (copy / "model.safetensors").unlink()
    yield Case("model folders", f"{kind}: no weights", partial(run, copy), (copy.name,))


def names(folder: Path) -> Iterator[Case]:
    """Names of folders that do not exist, none of which may be looked up on the network."""
    (folder / "outputs").mkdir()
    for name in (
        "./missing", "../missing", "/missing/model", "~/missing", f"{folder}/missing", f"{folder}/outputs/tokcom",
        "missing/model/folder", ".\\missing", "missing/", "a b", "model.safetensors", "missing.pt",
        "outputs/missing", "", "a\0b",
    ):  # fmt: skip
        for recipe, option in ((infer_tokcom, "--model"), (analyze_codebook, "--model_path")):
            run = partial(at_command_line, recipe.main, [option, name])
            words = (name.rstrip("/").rpartition("/")[2], repr(name)) if name else (option[2:], "''")
            yield Case("model folders", f"{recipe.__name__}: {name!r:.40}", run, words)
