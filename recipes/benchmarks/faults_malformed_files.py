"""Malformed latents and torch files."""

import json
import os
import pickle
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import convert_tokcom_checkpoint
import infer_tokcom
import torch
from faults_malformed_check import Case, at_command_line
from faults_malformed_models import model, save_latents_of, save_model, save_pt
from safetensors.torch import save_file

from tokcom_hf.data.latents import FORMAT, load_latents, vae_fingerprint
from tokcom_hf.pruning_checkpoint import convert_merger, read_part, read_parts
from tokcom_hf.tokcom_checkpoint import convert_checkpoint, read_checkpoint


class Command:
    """An object whose pickle runs a shell command when it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ.get('MALFORMED_CANARY', 'canary')}",)


def safetensors_files(whole: bytes) -> dict[str, bytes | None]:
    """Damaged copies of a safetensors file, by description; None stands for a sparse file of a terabyte."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(name for name in header if name != "__metadata__")

    def packed(changed: Any, content: bytes = data) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + content

    def with_first(**changes) -> bytes:
        return packed(header | {first: header[first] | changes})

    begin, end = header[first]["data_offsets"]
    return {
        "empty": b"",
        "seven bytes": whole[:7],
        "only the length": whole[:8],
        "half the header": whole[: 8 + length // 2],
        "half the tensors": whole[: 8 + length + len(data) // 2],
        "one byte short": whole[:-1],
        "one byte too many": whole + b"\0",
        "zeros": bytes(1000),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
        "a header of a terabyte": struct.pack("<Q", 2**40) + whole[8:],
        "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + whole[8:],
        "a header that is a list": packed([]),
        "a header that is no JSON": packed(b"{" * 50),
        "a header nested 5000 times": packed(b'{"a":' * 5000),
        "a tensor of a terabyte": with_first(shape=[2**38], data_offsets=[0, 2**40]),
        "a shape that overflows": with_first(shape=[2**62, 2**62]),
        "a negative shape": with_first(shape=[-1]),
        "another type": with_first(dtype="F99"),
        "offsets outside": with_first(data_offsets=[begin, end + len(data)]),
        "offsets backwards": with_first(data_offsets=[end, begin]),
        "a sparse terabyte": None,
    }


def pickles() -> dict[str, bytes]:
    """Torch files, by description, that are unreadable or hold no dictionary of tensors by known names."""
    import io

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    whole = saved({"a": torch.zeros(100)})
    return {
        "empty": b"",
        "text": b"hello",
        "half": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "zeros": bytes(500),
        "a bare pickle that runs a command": pickle.dumps(Command()),
        "a torch file that runs a command": saved({"a": Command()}),
        "an old torch file that runs a command": pickle.dumps({"a": Command()}, protocol=2),
        "a module": saved(torch.nn.Linear(2, 2)),
        "a list": saved([1, 2]),
        "a tensor": saved(torch.zeros(3)),
        "None": saved(None),
        "an empty dictionary": saved({}),
        "other names": saved({"weights": torch.zeros(3)}),
        "a dictionary of texts": saved({"a": "b"}),
        "keys that are numbers": saved({1: torch.zeros(2)}),
        "an archive that is no torch file": b"PK\x05\x06" + bytes(18),
        "the start of an archive, then zeros": b"PK\x03\x04" + bytes(100),
    }


def write(path: Path, content: bytes | None) -> Path:
    """Writes `content`, or a sparse file of a terabyte for None; returns the path."""
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, 1 << 40)
    return path


def cases(folder: Path) -> Iterator[Case]:
    """Writes the files into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from latents(folder / "latents")
    yield from checkpoints(folder / "pt")
    yield from pruning_parts(folder / "parts")


def latents(folder: Path) -> Iterator[Case]:
    """Latents files that are damaged, that lack something, or whose values do not fit the model."""
    folder.mkdir()
    tokcom = model("tokcom")
    whole = {suffix: save_latents_of(folder / f"good{suffix}").read_bytes() for suffix in (".safetensors", ".pt")}
    for suffix in whole:
        yield Case("latents", f"good{suffix}", partial(load_latents, folder / f"good{suffix}", tokcom), fine=True)
    for number, (name, content) in enumerate(safetensors_files(whole[".safetensors"]).items()):
        path = write(folder / f"latents_{number}.safetensors", content)
        yield Case("latents", f"safetensors: {name}", partial(load_latents, path, tokcom), (path.name,))
    for number, (name, content) in enumerate(pickles().items()):
        path = write(folder / f"latents_{number}.pt", content)
        yield Case("latents", f"torch: {name}", partial(load_latents, path, tokcom), (path.name,))
    good = {"latents.0": torch.zeros(2, 16)}
    metadata = {
        "format": FORMAT, "model": "", "fingerprint": vae_fingerprint(tokcom), "chunk_size": "4", "latent_size": "16",
        "token_count": "[6]",
    }  # fmt: skip
    wrong: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "another format": (good, {"format": "other"}),
        "another chunk size": (good, {"chunk_size": "8"}),
        "a chunk size in words": (good, {"chunk_size": "four"}),
        "another model": (good, {"fingerprint": "0"}),
        "counts that are no JSON": (good, {"token_count": "["}),
        "counts that are no list": (good, {"token_count": "6"}),
        "counts that are texts": (good, {"token_count": '["6"]'}),
        "a negative count": (good, {"token_count": "[-6]"}),
        "more tokens than chunks": (good, {"token_count": "[900]"}),
        "more texts than tensors": (good, {"token_count": "[6, 6]"}),
        "more tensors than texts": (good | {"latents.1": torch.zeros(1, 16)}, {}),
        "another width": ({"latents.0": torch.zeros(2, 15)}, {}),
        "one dimension": ({"latents.0": torch.zeros(16)}, {}),
        "integers": ({"latents.0": torch.zeros(2, 16, dtype=torch.int64)}, {}),
        "NaN": ({"latents.0": torch.full((2, 16), float("nan"))}, {}),
        "infinity": ({"latents.0": torch.full((2, 16), float("inf"))}, {}),
    }
    for number, (name, (tensors, changes)) in enumerate(wrong.items()):
        path = folder / f"wrong_{number}.safetensors"
        save_file(tensors, path, metadata=metadata | changes)
        yield Case("latents", f"values: {name}", partial(load_latents, path, tokcom), (path.name,))
        torch.save(metadata | changes | {"latents": list(tensors.values())}, path.with_suffix(".pt"))
        run = partial(load_latents, path.with_suffix(".pt"), tokcom)
        yield Case("latents", f"values in a torch file: {name}", run, (path.with_suffix(".pt").name,))
    for key in ("model", "fingerprint", "chunk_size", "latent_size", "token_count"):
        path = folder / f"no_{key}.safetensors"
        save_file(good, path, metadata={name: value for name, value in metadata.items() if name != key})
        yield Case("latents", f"no {key}", partial(load_latents, path, tokcom), (path.name,))


def checkpoints(folder: Path) -> Iterator[Case]:
    """The documented TokCom checkpoint, by its function and at the command line."""
    save_model("tokcom", folder / "tokenizer")
    good = torch.load(save_pt(folder / "good.pt", str(folder / "tokenizer")), weights_only=True)

    def read(path: Path) -> None:
        convert_checkpoint(read_checkpoint(path))

    yield Case(".pt files", "good", partial(read, folder / "good.pt"), fine=True)
    for number, (name, content) in enumerate(pickles().items()):
        path = write(folder / f"pickle_{number}.pt", content)
        yield Case(".pt files", f"checkpoint: {name}", partial(read, path), (path.name,))
        argv = ["--checkpoint", str(path), "--mode", "generate", "--num_chunks", "1"]
        run = partial(at_command_line, infer_tokcom.main, argv)
        yield Case(".pt files", f"infer_tokcom: {name}", run, (path.name,))
    arguments, weights = good["model_args"], good["vae_model_state_dict"]
    embedding, norm = weights["embed_tokens.weight"], next(name for name in weights if "norm" in name)
    changes: dict[str, dict[str, Any]] = {
        "model_args is a list": {"model_args": [1]},
        "model_args is empty": {"model_args": {}},
        "a size is a text": {"model_args": arguments | {"hidden_size": "wide"}},
        "a size is None": {"model_args": arguments | {"hidden_size": None}},
        "a size is zero": {"model_args": arguments | {"num_attention_heads": 0}},
        "a size is negative": {"model_args": arguments | {"hidden_size": -16}},
        "a size is NaN": {"model_args": arguments | {"hidden_size": float("nan")}},
        "a width of a billion": {"model_args": arguments | {"hidden_size": 10**9}},
        "a billion layers": {"model_args": arguments | {"num_hidden_layers": 10**9}},
        "a vocabulary of a trillion": {"model_args": arguments | {"vocab_size": 10**12}},
        "another width": {"model_args": arguments | {"hidden_size": 32}},
        "no weights": {"vae_model_state_dict": {}},
        "weights that are numbers": {"vae_model_state_dict": dict.fromkeys(weights, 1)},
        "a missing weight": {"vae_model_state_dict": {k: v for k, v in weights.items() if k != norm}},
        "an extra weight": {"vae_model_state_dict": weights | {"more": embedding}},
        "NaN in the weights": {"vae_model_state_dict": weights | {norm: weights[norm] * float("nan")}},
        "integers as weights": {"vae_model_state_dict": {k: v.int() for k, v in weights.items()}},
        "an embedding of one dimension": {"vae_model_state_dict": weights | {"embed_tokens.weight": embedding[0]}},
        "a denoiser that is a list": {"denoised_model_state_dict": [1]},
        "a denoiser of other names": {"denoised_model_state_dict": {"a": embedding}},
        "config is a list": {"config": [1]},
        "a chunk size of zero": {"config": good["config"] | {"chunk_size": 0}},
        "a chunk size in words": {"config": good["config"] | {"chunk_size": "four"}},
        "a length in words": {"config": good["config"] | {"max_length": "long"}},
        "noise that is NaN": {"config": good["config"] | {"noise_std": float("nan")}},
    }  # fmt: skip
    for number, (name, change) in enumerate(changes.items()):
        path = folder / f"changed_{number}.pt"
        torch.save(good | change, path)
        argv = [str(path), str(folder / "out"), "--tokenizer", str(folder / "tokenizer")]
        run = partial(at_command_line, convert_tokcom_checkpoint.main, argv)
        yield Case(".pt files", f"convert_tokcom_checkpoint: {name}", run, (path.name,))


def pruning_parts(folder: Path) -> Iterator[Case]:
    """Files of a documented pruning run."""
    folder.mkdir()
    for number, (name, content) in enumerate(pickles().items()):
        path = write(folder / f"token_merger_step_{number}.pt", content)
        if name == "an empty dictionary":  # a readable state dict without weights, which the conversion refuses
            yield Case(".pt files", f"pruning: {name}", lambda path=path: convert_merger(read_part(path)), ("weight",))
        elif name != "other names":
            yield Case(".pt files", f"pruning: {name}", partial(read_part, path), (path.name,))
    yield Case(".pt files", "pruning: no such step", partial(read_parts, folder, 999), ("999",))
    yield Case(".pt files", "pruning: no such folder", partial(read_parts, folder / "missing"), ("missing",))
