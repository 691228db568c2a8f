"""Binary codes ↔ token ids: id = start + Σ_i bit_i · 2^i, bit 0 least significant, in integer arithmetic."""

import torch

MAX_OUTPUT_DIM = 24


def check_output_dim(output_dim: int) -> int:
    """`output_dim`, if it is an integer from 1 to 24 (2^24 rows of width 4096 are 128 GiB in bfloat16).

    Raises:
        ValueError: otherwise.
    """
    if isinstance(output_dim, bool) or not isinstance(output_dim, int) or not 1 <= output_dim <= MAX_OUTPUT_DIM:
        raise ValueError(
            f"output_dim, the number of bits of an LFQ code, must be an integer from 1 to {MAX_OUTPUT_DIM} (2^output_dim "
            f"rows are added to the vocabulary), got {output_dim!r}."
        )
    return output_dim


def encode_lfq_codes_to_tokens(lfq_codes: torch.Tensor, start_token_id: int, output_dim: int) -> torch.Tensor:
    """Token ids of binary codes.

    Args:
        lfq_codes: `(batch, length, output_dim)`, or any other leading shape; a value above 0 is bit 1, so codes in
            {0, 1}, in {-1, 1}, booleans and real-valued features all work, in every dtype.
        start_token_id: id of the code whose bits are all 0.
        output_dim: bits per code.

    Returns:
        `(batch, length)` int64 ids in `[start_token_id, start_token_id + 2^output_dim)`.

    Raises:
        ValueError: the last dimension is not `output_dim`, or `output_dim` is out of range.
    """
    check_output_dim(output_dim)
    if lfq_codes.dim() == 0 or lfq_codes.shape[-1] != output_dim:
        raise ValueError(
            f"The last dimension of lfq_codes must hold output_dim={output_dim} bits, got shape {tuple(lfq_codes.shape)}."
        )
    # In int64: a floating-point sum would lose low bits (bfloat16 has 8).
    place = torch.arange(output_dim, device=lfq_codes.device)
    return (lfq_codes > 0).long().bitwise_left_shift(place).sum(-1) + start_token_id


def decode_tokens_to_lfq_codes(
    token_ids: torch.Tensor, start_token_id: int, output_dim: int, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Binary codes of token ids, the inverse of `encode_lfq_codes_to_tokens`.

    Args:
        token_ids: `(batch, length)` integers, or any other shape.
        start_token_id: id of the code whose bits are all 0.
        output_dim: bits per code.
        dtype: dtype of the result.

    Returns:
        `(batch, length, output_dim)` with values in {0, 1}.

    Raises:
        TypeError: ids that are not integers.
        ValueError: an id outside `[start_token_id, start_token_id + 2^output_dim)`.
    """
    check_output_dim(output_dim)
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"token_ids must be integers, got {token_ids.dtype}.")
    index = token_ids.long() - start_token_id
    outside = (index < 0) | (index >= 2**output_dim)
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {index.numel()} token ids are no LFQ tokens: these are "
            f"{start_token_id} … {start_token_id + 2**output_dim - 1}, got for example {int(token_ids[outside][0])}."
        )
    place = torch.arange(output_dim, device=token_ids.device)
    return (index.unsqueeze(-1).bitwise_right_shift(place) & 1).to(dtype)
