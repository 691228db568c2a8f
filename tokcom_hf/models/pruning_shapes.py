"""Checks that the configurations of `TokenMerger` and `LayerPruner` share."""


def check_architecture(architecture: str) -> None:
    """Raises ValueError for an unknown architecture."""
    if architecture not in ("normalized", "documented"):
        raise ValueError(f"architecture must be normalized or documented, got {architecture!r}.")


def check_heads(internal_size: int, num_attention_heads: int) -> None:
    """Raises ValueError where the width cannot be split over the attention heads."""
    if internal_size % num_attention_heads:
        raise ValueError(
            f"internal_size {internal_size} must be a multiple of num_attention_heads {num_attention_heads}."
        )
