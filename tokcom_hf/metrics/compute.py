"""Counts training compute: floating-point operations of matrix products and attention, forward and backward.

A multiply-add counts as two operations. Attention counts in full, causal or not. Recomputation (chunked cross-entropy,
gradient checkpointing) counts again. Norms, activations and the optimizer are not counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# PyTorch's counter knows the attention kernels for GPUs but not the one for CPUs.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(function: Callable[[], Any]) -> int:
    """Returns the number of floating-point operations of one call of `function`."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def count_training_flops(loss: Callable[[], torch.Tensor]) -> int:
    """Returns the floating-point operations of `loss()` and its backward pass; gradients accumulate as usual."""
    return count_flops(lambda: loss().backward())


def llama_parameters(config: LlamaConfig) -> int:
    """Number of parameters of `LlamaForCausalLM(config)` without biases; a tied embedding counts once."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    hidden, kv = config.hidden_size, (config.num_key_value_heads or config.num_attention_heads) * head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings + hidden


def matching_llama_config(
    num_parameters: int, vocab_size: int, num_layers: int | None = None, head_dim: int = 32, max_length: int = 1024
) -> LlamaConfig:
    """Returns the config of a Llama with about `num_parameters`, a tied embedding, and an MLP about three times as wide.

    Without `num_layers`, the depth is chosen so that hidden size is nearest to 48 · layers, a usual shape of small language
    models (6 × 256, 8 × 384).

    Args:
        num_parameters: number of parameters to match, as nearly as the widths allow.
        vocab_size: vocabulary size.
        num_layers: number of layers; None chooses from 2 to 32.
        head_dim: size of an attention head.
        max_length: maximum sequence length.

    Raises:
        ValueError: no shape has about so many parameters.
    """
    best: tuple[float, LlamaConfig] | None = None
    for layers in [num_layers] if num_layers else range(2, 33):
        for heads in range(1, 129):
            hidden = heads * head_dim
            config = LlamaConfig(
                vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim, tie_word_embeddings=True,
                max_position_embeddings=max_length,
            )  # fmt: skip
            found = llama_parameters(config)
            if found > 2 * num_parameters:
                break
            # The MLP's width makes up the difference, in steps of one unit per layer.
            width = 3 * hidden + round((num_parameters - found) / (3 * hidden * layers))
            if not hidden <= width <= 6 * hidden:
                continue
            config.intermediate_size = width
            cost = abs(hidden / (48 * layers) - 1) + abs(width / (3 * hidden) - 1)
            if best is None or cost < best[0]:
                best = (cost, config)
    if best is None:
        raise ValueError(
            f"No Llama with a vocabulary of {vocab_size} has about {num_parameters:,} parameters; the embedding alone "
            "needs more, or the number of layers does not fit."
        )
    return best[1]
