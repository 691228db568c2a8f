"""Malformed token ids, codes and prompts, for every method of the models that takes them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults_malformed_check import Case
from faults_malformed_models import VOCABULARY, lfq_processor, model, save_model, tokenizer

from tokcom_hf.data.caption_images import CaptionImageCollator
from tokcom_hf.data.vqa import VQACollator
from tokcom_hf.models.pipeline_tokcom import TokComGenerationPipeline
from tokcom_hf.tokcom_inference import generate

SIZE = VOCABULARY + 1  # with the omni token


def broken_ids() -> dict[str, Any]:
    """Values to pass instead of token ids (1, 8), by description."""
    good = torch.arange(8)[None]
    return {
        "one id too large": torch.tensor([[1, 2, 3, SIZE]]),
        "an id far too large": torch.tensor([[1, 2, 3, 2**62]]),
        "a negative id": torch.tensor([[1, -1, 3, 4]]),
        "the padding of labels": torch.tensor([[1, 2, -100, -100]]),
        "floats": good.float(),
        "halves": good.bfloat16(),
        "NaN": torch.full((1, 8), float("nan")),
        "booleans": torch.ones(1, 8, dtype=torch.bool),
        "complex numbers": torch.zeros(1, 8, dtype=torch.complex64),
        "no dimension": torch.tensor(3),
        "one dimension": torch.arange(8),
        "three dimensions": torch.zeros(1, 2, 4, dtype=torch.long),
        "no rows": torch.zeros(0, 8, dtype=torch.long),
        "no tokens": torch.zeros(1, 0, dtype=torch.long),
        "a list": [[1, 2, 3, 4]],
        "a text": "a text",
        "None in a list": [None],
    }


def broken_codes() -> dict[str, Any]:
    """Values to pass instead of codes (1, 4, 4) from 0 to 15, by description."""
    return {
        "a code too large": torch.full((1, 4, 4), 16),
        "a code far too large": torch.full((1, 4, 4), 2**62),
        "a negative code": torch.full((1, 4, 4), -1),
        "floats": torch.zeros(1, 4, 4),
        "NaN": torch.full((1, 4, 4), float("nan")),
        "booleans": torch.zeros(1, 4, 4, dtype=torch.bool),
        "complex numbers": torch.zeros(1, 4, 4, dtype=torch.complex128),
        "no dimension": torch.tensor(3),
        "one dimension": torch.zeros(16, dtype=torch.long),
        "four dimensions": torch.zeros(1, 1, 4, 4, dtype=torch.long),
        "no rows": torch.zeros(0, 4, 4, dtype=torch.long),
        "no codes": torch.zeros(1, 0, 4, dtype=torch.long),
        "a list": [[[1]]],
    }


def broken_latents() -> dict[str, Any]:
    """Values to pass instead of latents (1, 2, 16), by description."""
    return {
        "another width": torch.zeros(1, 2, 15),
        "one dimension": torch.zeros(16),
        "two dimensions": torch.zeros(2, 16),
        "four dimensions": torch.zeros(1, 1, 2, 16),
        "integers": torch.zeros(1, 2, 16, dtype=torch.long),
        "NaN": torch.full((1, 2, 16), float("nan")),
        "infinity": torch.full((1, 2, 16), float("inf")),
        "no rows": torch.zeros(0, 2, 16),
        "no chunks": torch.zeros(1, 0, 16),
        "a list": [[[0.0] * 16]],
    }


def broken_pixels() -> dict[str, Any]:
    """Values to pass instead of pixels (1, 3, 16, 16), by description."""
    return {
        "three dimensions": torch.zeros(3, 16, 16),
        "four channels": torch.zeros(1, 4, 16, 16),
        "a side that does not divide": torch.zeros(1, 3, 15, 16),
        "no height": torch.zeros(1, 3, 0, 16),
        "no rows": torch.zeros(0, 3, 16, 16),
        "NaN": torch.full((1, 3, 16, 16), float("nan")),
        "infinity": torch.full((1, 3, 16, 16), float("inf")),
        "a list": [[0.0]],
        "integers": torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        "complex numbers": torch.zeros(1, 3, 16, 16, dtype=torch.complex64),
    }


def cases(folder: Path) -> Iterator[Case]:
    """Yields the cases; `folder` gets the saved model of the pipeline cases."""
    vae, tokcom, vqgan = model("vae"), model("tokcom"), model("vqgan")
    readers: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "TokComVAE.encode": (vae.encode, broken_ids()),
        "TokComVAE.forward": (vae, broken_ids()),
        "TokComModel.forward": (tokcom, broken_ids()),
        "denoise_reconstruct": (partial(tokcom.denoise_reconstruct, num_steps=1), broken_ids()),
        "generate": (partial(tokcom.generate, num_generate_chunks=1, num_steps=1), broken_ids()),
        "TokComVAE.decode": (vae.decode, broken_latents()),
        "VQGAN.decode_codes": (vqgan.decode_codes, broken_codes()),
        "VQGAN.encode": (vqgan.encode, broken_pixels()),
        "VQGAN.forward": (vqgan, broken_pixels()),
    }
    for reader, (read, inputs) in readers.items():
        for name, value in inputs.items():
            yield Case("tokens", f"{reader}: {name}", partial(read, value))
    yield from lengths(vae, tokcom)
    yield from numbers(vae, tokcom)
    yield from lfq_ids()
    yield from prompts(folder)


def lengths(vae: Any, tokcom: Any) -> Iterator[Case]:
    """Rows that are no whole chunks, and attention masks that do not fit."""
    ids = torch.arange(8)[None]
    for number in (1, 3, 7):
        yield Case("tokens", f"encode: {number} tokens", partial(vae.encode, ids[:, :number]), ("chunk_size",))
    good = {"encode": vae.encode, "denoise_reconstruct": partial(tokcom.denoise_reconstruct, num_steps=1)}
    for name, read in good.items():
        yield Case("tokens", f"{name}: good", partial(read, ids), fine=True)
    masks = {"shorter": torch.ones(1, 7), "of rank 1": torch.ones(8), "of no token": torch.zeros(1, 8)}
    for name, mask in masks.items():
        run = partial(tokcom.generate, ids, attention_mask=mask, num_generate_chunks=1, num_steps=1)
        yield Case("tokens", f"generate: a mask {name}", run)


def numbers(vae: Any, tokcom: Any) -> Iterator[Case]:
    """Arguments out of range, for the method `generate`, the documented function and `denoise_reconstruct`."""
    wrong = {
        "num_chunks": (0, -1, 1.5, "4", float("nan")),
        "num_steps": (0, -3, 2.5, "many"),
        "batch_size": (0, -1, "2"),
        "temperature": (-1.0, float("nan"), float("inf"), "hot"),
        "best_of": (0, 1.5),
        "sampler": ("rk45", 3),
    }
    for name, values in wrong.items():
        for value in values:
            run = partial(tokcom.generate, **{"num_chunks": 1, "num_steps": 1} | {name: value})
            words = (name, "number of chunks") if name == "num_chunks" else (name,)
            yield Case("tokens", f"generate: {name}={value!r}", run, words)
    for name in ("num_chunks", "num_steps", "noise_std", "hidden_size", "chunk_size"):
        options = {"num_chunks": 1, "num_steps": 1} | {name: -1}
        run = partial(generate, tokcom.vae, tokcom, **options)
        words = (name, "number of chunks") if name == "num_chunks" else (name,)
        yield Case("tokens", f"tokcom_inference.generate: {name}=-1", run, words)
    for level in (-0.1, 1.1, float("nan")):
        run = partial(tokcom.denoise_reconstruct, torch.arange(8)[None], noise_level=level)
        yield Case("tokens", f"denoise_reconstruct: noise_level={level}", run, ("noise_level",))


def lfq_ids() -> Iterator[Case]:
    """Ids that are no LFQ tokens."""
    processor = lfq_processor()
    for name, ids in {
        "below the range": torch.tensor([1, 2]),
        "above the range": torch.tensor([VOCABULARY + 16]),
        "negative": torch.tensor([-5]),
        "floats": torch.tensor([float(VOCABULARY)]),
        "booleans": torch.tensor([True]),
    }.items():
        yield Case("tokens", f"LFQProcessor.codes: {name}", partial(processor.codes, ids))


def prompts(folder: Path) -> Iterator[Case]:
    """Prompts of the pipeline, of the processor and of the collators."""
    save_model("tokcom", folder / "tokcom")
    pipe = TokComGenerationPipeline(model("tokcom"), tokenizer=tokenizer())
    ask = partial(pipe, num_generate_chunks=1, num_steps=1)
    for name, value in {
        "an empty text": "",
        "a number": 3,
        "bytes": b"a text",
        "a list with None": ["a", None],
        "a list with a number": ["a", 3],
        "a list with an empty text": ["a", ""],
        "a dictionary": {"text": "a"},
        "half a surrogate pair": "a \ud83d",
        "a tensor": torch.zeros(2),
    }.items():
        yield Case("prompts", f"TokComGenerationPipeline: {name}", partial(ask, value))
    for name, value in {"a zero byte": "a\0b", "a marker": "<|endoftext|>", "a template": "{{ 7 * 7 }} {x}"}.items():
        yield Case("prompts", f"TokComGenerationPipeline: {name}", partial(ask, value), fine=True)
    for name, value in {
        "a marker beyond the codes": "<lfq:16>",
        "a negative marker": "<lfq:-1>",
        "a marker with a long number": "<lfq:" + "9" * 5000 + ">",
        "a number": 3,
        "None": None,
        "half a surrogate pair": "\ud83d",
    }.items():
        fine = value == "<lfq:-1>"  # no marker, so it is read as text
        yield Case("prompts", f"LFQProcessor: {name}", partial(lfq_processor(), text=value), fine=fine)
    for name, prompt in {"without {question}": "<image> {qestion}", "empty": "", "a number": 3, "None": None}.items():
        yield Case(
            "prompts", f"VQACollator: a prompt {name}", partial(VQACollator, lfq_processor(), prompt), ("prompt",)
        )
    for drop in (-0.5, 1.5, float("nan")):
        run = partial(CaptionImageCollator, lfq_processor(), drop)
        yield Case("prompts", f"CaptionImageCollator: caption_drop={drop}", run, ("caption_drop",))
