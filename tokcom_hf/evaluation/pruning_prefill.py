"""Prefill and decode time of a `PrunedVLM` per mode, measured side by side (A B A B, medians)."""

import statistics
import time

import torch


@torch.no_grad()
def time_modes(model, batch: dict, modes: list[str], repeats: int = 5, new_tokens: int = 4) -> dict[str, dict]:
    """Median seconds of one prefill and of one decoded token, and bytes of the KV cache, per mode.

    `prefill_cpu` is the processor time of all threads, which other work on the machine does not lengthen; it says
    something where the model runs on the CPU.

    Args:
        model: a `PrunedVLM`.
        batch: inputs of one batch, left-padded.
        modes: pruning modes to compare.
        repeats: rounds; in each round every mode runs once, after one round that is not counted.
    """
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    prefill: dict[str, list[float]] = {mode: [] for mode in modes}
    decode: dict[str, list[float]] = {mode: [] for mode in modes}
    processor: dict[str, list[float]] = {mode: [] for mode in modes}
    memory: dict[str, int] = {}
    model.eval()
    for round_number in range(repeats + 1):
        for mode in modes:
            start, start_cpu = _now(), time.process_time()
            output = model(**batch, pruning_mode=mode, use_cache=True, logits_to_keep=1)
            middle, middle_cpu = _now(), time.process_time()
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            for _ in range(new_tokens):
                model(ids, cache=output.cache)
            end = _now()
            layers = output.cache.layers
            extra = len(layers) * new_tokens
            memory[mode] = sum(_bytes(layer.keys) + _bytes(layer.values) for layer in layers)
            memory[mode] -= extra * 2 * _bytes(layers[0].keys[:, :, :1])
            if round_number:
                prefill[mode].append(middle - start)
                processor[mode].append(middle_cpu - start_cpu)
                decode[mode].append((end - middle) / new_tokens)
    return {
        mode: {
            "prefill": statistics.median(prefill[mode]),
            "prefill_cpu": statistics.median(processor[mode]),
            "decode": statistics.median(decode[mode]),
            "kv_bytes": memory[mode],
        }
        for mode in modes
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
