"""Measures prefill and decode time of a `PrunedVLM` in several pruning modes; modes alternate, medians are reported."""

import statistics
import time

import torch


@torch.no_grad()
def time_modes(model, batch: dict, modes: list[str], repeats: int = 5, new_tokens: int = 4) -> dict[str, dict]:
    """Measures prefill and decode time and the KV cache's size in each mode.

    Args:
        model: a `PrunedVLM`.
        batch: inputs of one batch, left-padded.
        modes: pruning modes to compare.
        repeats: number of rounds, after one warm-up round; each round runs every mode once.
        new_tokens: tokens decoded after each prefill.

    Returns:
        mode -> prefill (median seconds), prefill_cpu (median CPU seconds of all threads, meaningful only for a model on the
        CPU; other work on the machine does not affect it), decode (median seconds per token), kv_bytes (cache size after
        prefill).
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
