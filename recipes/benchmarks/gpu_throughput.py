"""Throughput of TokCom models and Llamas of their size: training steps and generation, for tokcom_gpu.py."""

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.cli import read_yaml
from tokcom_hf.evaluation.text_generation import CausalSampler, Sampler, TokComSampler
from tokcom_hf.metrics.compute import matching_llama_config
from tokcom_hf.models.tokcom_objective import stride_of_blocks

# Shapes of the parts; `paper` is the documented system, without a context.
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "toy": {
        "vae": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "context": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "denoiser": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "12M": {
        "vae": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        "context": {"hidden_size": 320, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 1408},
        "denoiser": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    },
    "110M": {
        "vae": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
        "context": {"hidden_size": 768, "num_hidden_layers": 10, "num_attention_heads": 12, "intermediate_size": 2048},
        "denoiser": {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 1536},
    },
    "paper": {},
}
PAPER_LENGTH, LENGTH = 1024, 256
SMALL = Path(__file__).parents[1] / "configs" / "small" / "train_tokcom.yaml"


def flow_settings() -> dict[str, Any]:
    """The flow of `configs/small`, as fields of `TokComConfig`."""
    return read_yaml(SMALL.read_text(encoding="utf-8"))["flow"]


def build(size: str, vocabulary: int, device: str) -> TokComModel:
    """An untrained model of one of `SIZES`; `paper` keeps the documented vocabulary."""
    shapes = {
        part: {"num_key_value_heads": shape["num_attention_heads"], **shape} for part, shape in SIZES[size].items()
    }
    if shapes:
        config = TokComConfig(
            vae=shapes["vae"] | {
                "vocab_size": vocabulary, "latent_size": 128, "chunk_projection": "all", "fixed_norm": True,
                "latent_noise": 0.75,
            },
            denoiser=shapes["denoiser"] | {"time_scale": 1000.0},
            context=shapes["context"] | {"max_position_embeddings": 2 * PAPER_LENGTH},
            max_chunks=LENGTH // 4,
            **flow_settings() | {"block_sizes": [1, 1, 1, 4, 16]},
        )  # fmt: skip
    else:
        config = TokComConfig()
    with torch.device(device):
        return TokComModel(config)


def throughput(
    size: str, vocabulary: int, run: Any, left_out: list[str], seconds_left: Callable[[], float]
) -> dict[str, Any]:
    """Tokens per second of training and generation, for one size and a Llama of as many parameters."""
    if seconds_left() <= 0:
        left_out.append(f"all of {size}")
        return {}
    model = build(size, vocabulary, run.device)
    parameters, length = model.num_parameters(), PAPER_LENGTH if size == "paper" else LENGTH
    config = matching_llama_config(
        parameters,
        model.config.vae.omni_token_id,
        head_dim=64 if parameters > 1_000_000 else 16,
        max_length=2 * PAPER_LENGTH,
    )
    with torch.device(run.device):
        baseline = LlamaForCausalLM(config)
    found: dict[str, Any] = {
        "parameters": parameters,
        "baseline_parameters": baseline.num_parameters(),
        "generation": [],
    }
    print(f"\n{size}: {parameters:,} parameters, baseline {baseline.num_parameters():,}", flush=True)

    tokens = run.step_tokens // (4 if size == "paper" else 1)
    ids = torch.randint(config.vocab_size, (max(1, tokens // length), length), device=run.device)
    stage_two = [p for part in (model.denoiser, model.context) if part is not None for p in part.parameters()]
    block = {"block_size": model.config.block_sizes[0], "block_stride": stride_of_blocks(model.config)}
    stages: dict[str, tuple[Callable[[], torch.Tensor], list[nn.Parameter]]] = {
        "vae stage": (lambda: model.vae(ids, labels=ids).loss, list(model.vae.parameters())),
        "denoiser stage": (lambda: model(ids, **block).loss, stage_two),
        "baseline": (lambda: baseline(input_ids=ids, labels=ids, use_cache=False).loss, list(baseline.parameters())),
    }
    for name, (loss, trained) in stages.items():
        model.vae.requires_grad_(name == "vae stage")
        found[f"{name}, trained tokens/s"] = speed = ids.numel() / training_step_seconds(loss, trained, run)
        print(f"  training, {name}: {speed:,.0f} tokens/s", flush=True)

    model.to(torch.bfloat16).eval().requires_grad_(False)
    baseline.to(torch.bfloat16).eval()
    for batch in run.batch_sizes:
        for row, sampler in samplers_of(model, baseline, batch, run):
            if seconds_left() <= 0:
                left_out.append(f"{size}, batch {batch}, {row}")
                continue
            found["generation"].append(generation_row(row, sampler, batch, run, found["generation"]))
    return found


def samplers_of(model: TokComModel, baseline: LlamaForCausalLM, batch: int, run: Any) -> list[tuple[dict, Sampler]]:
    """The baseline's sampler, and TokCom's for each block size and number of steps, each with its description."""
    # Without a context the whole row is one block.
    blocks = run.block_sizes if model.context is not None else [0]
    samplers: list[tuple[dict[str, Any], Sampler]] = [
        ({"model": "baseline"}, CausalSampler(baseline, 0, batch_size=batch))
    ]
    for block, steps in product(blocks, run.num_steps):
        settings = {"block_size": block, "num_steps": steps}
        samplers.append(({"model": "TokCom", **settings}, TokComSampler(model, settings, batch_size=batch)))
    return samplers


def generation_row(row: dict[str, Any], sampler: Sampler, batch: int, run: Any, earlier: list[dict]) -> dict[str, Any]:
    """Measures and prints tokens per second of a sampler; for TokCom also the speedup at the same batch size."""
    sampler.rows(batch, 16, seed=0)
    seconds = timed(partial(sampler.rows, batch, run.tokens, seed=1), run.device)
    row |= {"batch": batch, "tokens_per_second": batch * run.tokens / seconds}
    if row["model"] == "TokCom" and earlier:
        same = next(r for r in earlier if r["model"] == "baseline" and r["batch"] == batch)
        row["speedup"] = row["tokens_per_second"] / same["tokens_per_second"]
    cells = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print("  " + "  ".join(cells), flush=True)
    return row


def training_step_seconds(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], run: Any) -> float:
    """Seconds of one optimizer step in bfloat16 with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=run.device == "cuda")

    def step() -> None:
        with torch.autocast(run.device, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    return timed(lambda: [step() for _ in range(run.timed_steps)], run.device) / run.timed_steps


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work()`, with the GPU synchronised before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
