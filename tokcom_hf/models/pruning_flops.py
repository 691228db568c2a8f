"""FLOPs and KV memory of a VLM whose layers see different numbers of tokens.

A multiplication and an addition are two FLOPs: a matrix product of (a, b) and (b, c) has 2abc. A decoder layer with n tokens
has 2·n·d·(d_q + 2·d_kv) + 2·n·d_q·d for the projections of attention, 4·n²·d_q for scores and values, 6·n·d·m for the MLP.
"""

from collections.abc import Sequence

from torch import nn


def decoder_layer_flops(config, tokens: float, keys: float | None = None) -> float:
    """FLOPs of one decoder layer for `tokens` queries and `keys` keys; as many keys as queries where None."""
    keys = tokens if keys is None else keys
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head
    key_values = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    width = config.hidden_size
    projections = 2 * tokens * width * (queries + 2 * key_values) + 2 * tokens * queries * width
    return projections + 4 * tokens * keys * queries + 6 * tokens * width * config.intermediate_size


def vision_tower_flops(config, patches: float | Sequence[float], windows: Sequence[int] = ()) -> float:
    """FLOPs of a ViT: per layer 8·n·d² for projections, 4·n²·d for scores and values, 4·n·d·m for the MLP (gated: 6·n·d·m).

    Args:
        config: the tower's configuration.
        patches: n, the patches that attend to each other; a list for several sequences.
        windows: sizes w of the attention windows of all layers that are not in `config.fullatt_block_indexes`; their scores
            and values are Σ 4·w²·d.
    """
    # Qwen2-VL's `hidden_size` is the language model's width.
    width = getattr(config, "embed_dim", None) or config.hidden_size
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", 0)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "mlp_ratio", 4) * width
    matrices = 6 if config.model_type in ("qwen2_5_vl", "qwen2_5_vl_vision", "pixtral") else 4
    full = len(config.fullatt_block_indexes) if windows else depth
    sequences = patches if isinstance(patches, Sequence) else [patches]
    pairs = full * sum(n**2 for n in sequences) + (depth - full) * sum(n**2 for n in windows)
    return depth * sum(sequences) * (8 * width**2 + matrices * width * inner) + 4 * pairs * width


def linear_flops(module: nn.Module | None, tokens: float) -> float:
    """FLOPs of the linear layers of `module`, each applied once per token: 2 · weights · tokens."""
    if module is None:
        return 0.0
    return 2.0 * tokens * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def token_merger_flops(merger, tokens: int, kept: float, question: float) -> float:
    """FLOPs of a `TokenMerger` on one image: its linear layers, attention to the question, similarity and merging."""
    if merger is None:
        return 0.0
    size, features = merger.config.internal_size, merger.config.feature_size
    total = linear_flops(getattr(merger, "question_proj", None), question) + sum(
        linear_flops(getattr(merger, name, None), tokens) for name in ("feature_proj", "similarity_proj", "q_proj")
    )
    total += linear_flops(getattr(merger, "k_proj", None), kept)
    if merger.config.merger_type != "fixed_pooling":
        total += linear_flops(merger.scorer, tokens)
    if merger.config.merger_type == "question_aware":
        total += question_attention_flops(size, tokens, question)
    guide = getattr(merger, "question_guide", None)
    if guide is not None:
        total += linear_flops(guide.query, question) + linear_flops(guide.key, tokens) + 2 * tokens * question * size
    return total + 2 * tokens * kept * size + 2 * tokens * kept * features


def pruner_head_flops(pruner, tokens: float, question: float) -> float:
    """FLOPs of one `LayerPruner` head on one image."""
    config = pruner.config
    size, width = config.internal_size, config.hidden_size
    hidden = config.scorer_size or size
    total = 2 * tokens * (width * size + size * hidden + hidden)
    if config.pruner_type == "cross_attention":
        total += 2 * question * width * size + question_attention_flops(size, tokens, question)
    return total


def question_attention_flops(size: int, tokens: float, question: float) -> float:
    """FLOPs of a `QuestionAttention`: projections of tokens and question, scores and values."""
    return 4 * tokens * size**2 + 4 * question * size**2 + 4 * tokens * question * size


def kv_cache_bytes(config, tokens_per_layer: Sequence[float], bytes_per_value: int) -> float:
    """Bytes of the keys and values of one row in all layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_values = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    return 2.0 * key_values * bytes_per_value * sum(tokens_per_layer)
