"""Which of a module's trained numbers are no longer finite."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def nonfinite_names(module: nn.Module) -> list[str]:
    """Names of what trains or is a stored buffer and holds NaN or infinity."""
    tensors = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }
    if isinstance(module, AveragedModel):
        tensors = module.state_dict()
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor.detach()).all()]
