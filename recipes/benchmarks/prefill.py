"""Measures prefill time, decode time and KV memory, pruned against unpruned, at a chosen layer shape.

    python recipes/benchmarks/prefill.py                          # LLaVA-1.5-7B layers, as many as fit in --max_gib
    python recipes/benchmarks/prefill.py --layers 32 --device cuda
    python recipes/benchmarks/prefill.py --documented true        # layers 10/20/31, ratio 0.5; table only

Weights are random: time and memory do not depend on their values. The pruning layers are scaled to the number of layers
built. Prints the predicted speedup (from FLOPs) beside the measured one (medians of interleaved runs, A B A B).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tokcom_hf import LayerPrunerConfig, PrunedVLM, TokenMergerConfig
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.evaluation.pruning_prefill import time_modes
from tokcom_hf.models.pruning_report import predicted_report

GIB = 2**30


@dataclass
class RunArguments:
    """Shape and place of the measurement."""

    layers: int | None = field(
        default=None, metadata={"help": "Decoder layers; as many as fit where not set (32 at most)."}
    )
    max_gib: float = field(default=4.0, metadata={"help": "Memory for the decoder's weights."})
    hidden_size: int = field(default=4096, metadata={"help": "Width (4096 for LLaVA-1.5-7B)."})
    intermediate_size: int = field(default=11008, metadata={"help": "Width of the MLP."})
    heads: int = field(default=32, metadata={"help": "Attention heads."})
    vision_layers: int = field(default=24, metadata={"help": "Layers of the CLIP tower."})
    text_tokens: int = field(default=48, metadata={"help": "Text tokens of the prompt."})
    merge_to: int = field(default=192, metadata={"help": "Vision tokens after the merger."})
    keep: list[int] = field(default_factory=lambda: [128, 64], metadata={"help": "Vision tokens after each pruner."})
    at: list[float] = field(
        default_factory=lambda: [0.25, 0.5], metadata={"help": "Pruning layers, as shares of the depth."}
    )
    documented: bool = field(default=False, metadata={"help": "Print the table of the documented configuration only."})
    repeats: int = field(default=3, metadata={"help": "Rounds of the measurement."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float32."})
    output_dir: str = field(default="outputs/prefill", metadata={"help": "Folder of results.json."})


def main() -> None:
    """Measures one layer shape, or tabulates the documented one; prints and saves the result."""
    run = RunArguments(**parse_recipe(__doc__, {"run": RunArguments})["run"])
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if run.documented:
        table = documented_table()
        (out / "documented.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        return
    dtype = getattr(torch, run.dtype)
    per_layer = (4 * run.hidden_size**2 + 3 * run.hidden_size * run.intermediate_size) * dtype.itemsize
    layers = run.layers or max(4, min(32, int(run.max_gib * GIB / per_layer)))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = build(run, layers, "eager" if run.device == "meta" else "sdpa", run.device)
    torch.set_default_dtype(torch.float32)
    ids = torch.full((1, 576 + run.text_tokens), 5, device=run.device)
    ids[0, 4:580] = model.family.image_token_id
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, device=run.device).to(dtype),
    }
    times = time_modes(model, batch, ["origin", "hard"], run.repeats)
    model(**batch, pruning_mode="hard")
    report = model.token_report()
    speedup = times["origin"]["prefill"] / times["hard"]["prefill"]
    cpu_speedup = times["origin"]["prefill_cpu"] / times["hard"]["prefill_cpu"]
    results = {
        "layers": layers,
        "device": run.device,
        "dtype": run.dtype,
        "vision_tokens_per_layer": report["vision_tokens_per_layer"],
        "flops_parts": report["flops_parts"],
        "flops_ratio": report["flops_ratio"],
        "predicted_speedup": 1 / report["flops_ratio"],
        "measured_speedup": speedup,
        "measured_over_predicted": speedup * report["flops_ratio"],
        "processor_time_speedup": cpu_speedup,
        "processor_over_predicted": cpu_speedup * report["flops_ratio"],
        "decode_speedup": times["origin"]["decode"] / times["hard"]["decode"],
        "kv_predicted": report["kv_bytes"] / report["kv_bytes_origin"],
        "kv_measured": times["hard"]["kv_bytes"] / times["origin"]["kv_bytes"],
        "times": times,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{layers} layers of width {run.hidden_size}, {run.dtype} on {run.device}; tokens "
          f"{[int(n) for n in report['vision_tokens_per_layer']]}")  # fmt: skip
    names = ["predicted_speedup", "measured_speedup", "measured_over_predicted", "decode_speedup"]
    if run.device == "cpu":
        names += ["processor_time_speedup", "processor_over_predicted"]
    for name in names:
        print(f"  {name:24s} {results[name]:.3f}")
    print(
        f"  {'KV predicted / measured':24s} {results['kv_predicted']:.4f} / {results['kv_measured']:.4f} of unpruned"
    )


def build(run: RunArguments, layers: int, attention: str, device: str) -> PrunedVLM:
    """A LLaVA with random weights, a merger and pruners at `run.at`."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=run.vision_layers, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=run.hidden_size, intermediate_size=run.intermediate_size, num_hidden_layers=layers,
        num_attention_heads=run.heads, num_key_value_heads=run.heads, vocab_size=512, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=511)
    at = [max(1, round(share * layers)) for share in run.at]
    with torch.device(device):
        base = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    merger = TokenMergerConfig(feature_size=1024, question_size=run.hidden_size, target_merge_tokens=run.merge_to)
    pruner = LayerPrunerConfig(hidden_size=run.hidden_size, layers=at, keep_tokens=run.keep)
    return PrunedVLM.from_base(base.eval(), merger, pruner).eval()


def documented_table() -> dict:
    """Token and FLOPs table of the documented configuration and of `base`, at LLaVA-1.5-7B's own shape."""
    tables = {}
    shapes = {
        "documented (288, halved at 10/20/31)": ([10, 20, 31], None, 0.5, 288),
        "base (192, then 128 at 8 and 64 at 16)": ([8, 16], [128, 64], 0.5, 192),
    }
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    for name, (at, keep, ratio, merged) in shapes.items():
        with torch.device("meta"):
            base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
            model = PrunedVLM.from_base(
                base,
                TokenMergerConfig(target_merge_tokens=merged),
                LayerPrunerConfig(layers=at, keep_tokens=keep, keep_ratio=ratio),
            )
        per_layer, tokens = [], merged
        for layer in range(32):
            if layer in at:
                tokens = keep[at.index(layer)] if keep else round(tokens * ratio)
            per_layer.append(float(tokens))
        report = tables[name] = predicted_report(model, 576.0, 48.0, per_layer, 20.0)
        print(
            f"{name}: average {sum(per_layer) / 32:.0f} of 576 vision tokens, sequence {100 * report['sequence_kept']:.1f} %"
        )
        print(f"  FLOPs {report['flops'] / 1e12:.2f} T of {report['flops_origin'] / 1e12:.2f} T: "
              f"{100 * (report['flops_ratio'] - 1):.1f} % (vision tower, projector and heads included)")  # fmt: skip
        for part, flops in report["flops_parts"].items():
            print(f"    {part:16s} {flops / 1e12:8.4f} T")
        print(f"  KV cache {100 * report['kv_bytes'] / report['kv_bytes_origin']:.1f} %")
    return tables


if __name__ == "__main__":
    run_recipe(main)
