"""Checks of tensors that callers pass: type, shape and values."""

from typing import Any

import torch


def check_ids(ids: Any, size: int | None = None, name: str = "input_ids", every_device: bool = False) -> None:
    """Checks token ids (batch, length).

    Args:
        size: vocabulary size; None does not check the values.
        every_device: also check the values of a tensor that is not on the CPU, which waits for its device.

    Raises:
        TypeError: `ids` is no tensor of integers.
        ValueError: `ids` is not two-dimensional, is empty, or holds an id outside [0, size).
    """
    kind = ids.dtype if torch.is_tensor(ids) else type(ids).__name__
    if not torch.is_tensor(ids) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of token ids (torch.long), got {kind}.")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{name} must be (batch, length), both at least 1, got {tuple(ids.shape)}.")
    if size is not None and (every_device or _at_hand(ids)) and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(
            f"{name} must be in 0 … {size - 1}, got {int(ids.min())} … {int(ids.max())}; was the text written by this "
            "model's tokenizer?"
        )


def check_floats(values: Any, name: str, shape: str, sizes: tuple[int | None, ...], finite: bool = True) -> None:
    """Checks a tensor of floating-point numbers.

    Args:
        shape: the shape in words, for the error.
        sizes: size of each dimension; None for any size of at least 1.
        finite: look for NaN and infinite values in tensors on the CPU.

    Raises:
        TypeError: `values` is no tensor of floating-point numbers.
        ValueError: `values` has another shape, is empty, or holds NaN or infinite values.
    """
    kind = values.dtype if torch.is_tensor(values) else type(values).__name__
    if not torch.is_tensor(values) or not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor {shape}, got {kind}.")
    fits = len(sizes) == values.dim() and all(n > 0 and wanted in (None, n) for n, wanted in zip(values.shape, sizes))
    if not fits:
        raise ValueError(f"{name} must have shape {shape} with no empty side, got {tuple(values.shape)}.")
    if finite and _at_hand(values) and not bool(values.isfinite().all()):
        raise ValueError(f"{name} hold NaN or infinite values.")


def _at_hand(tensor: torch.Tensor) -> bool:
    """Whether the values can be read: without waiting for a device, and not while a graph is traced."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
