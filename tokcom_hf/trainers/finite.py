"""Finds NaN and infinity in models, averaged weights and optimizer states."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel


def nonfinite_names(module: nn.Module) -> list[str]:
    """Names of the trainable parameters and stored buffers that hold NaN or infinity."""
    tensors = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
    if isinstance(module, AveragedModel):
        tensors = module.state_dict()
    return nonfinite(tensors)


def nonfinite_state(state: Any) -> list[str]:
    """Names, as paths with dots, of the tensors in nested dictionaries and lists that hold NaN or infinity."""
    return nonfinite(dict(_leaves(state)))


def _leaves(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, (Mapping, list, tuple)):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for name, value in items:
            yield from _leaves(value, f"{path}.{name}" if path else str(name))


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity; of a sharded tensor this rank's shard is read."""
    flags: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        part = tensor.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        # torch has no isfinite for floats of 8 bits.
        part = part.float() if part.element_size() == 1 else part
        flags[part.device][name] = torch.isfinite(part).all()
    # One transfer for each device, not one for each tensor.
    return [
        name
        for found in flags.values()
        for name, finite in zip(found, torch.stack(list(found.values())).tolist())
        if not finite
    ]
