"""Muon for matrices and AdamW for other parameters, as one optimizer that `Trainer` can schedule, save and resume."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer; their parameter groups are joined, so that one scheduler serves both.

    Args:
        matrices: 2-D parameters of hidden layers, updated by Muon (orthogonalised momentum; Jordan et al. 2024).
        others: all other parameters, updated by AdamW.
        muon_learning_rate, learning_rate: learning rates of Muon and of AdamW.
        weight_decay: decoupled weight decay of both.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        muon_learning_rate: float = 0.02,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ):
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(list(matrices), lr=muon_learning_rate, weight_decay=weight_decay),
            "adamw": torch.optim.AdamW(
                list(others), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay
            ),
        }
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        # Loading gives the parts new group dictionaries, which the scheduler must see.
        self.param_groups[:] = [group for part in self.parts.values() for group in part.param_groups]


def split_for_muon(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters in two lists: matrices of linear layers that are no output head, and all others."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    matrices = {
        id(layer.weight): layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer is not head and layer.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
    return list(matrices.values()), others


def muon_optimizer(model: nn.Module, args: Any) -> MuonWithAdamW:
    """The optimizer of a run with `muon_learning_rate`.

    Args:
        model: the model without its wrappers.
        args: `CompressionTrainingArguments`.
    """
    matrices, others = split_for_muon(model)
    return MuonWithAdamW(
        matrices,
        others,
        muon_learning_rate=args.muon_learning_rate,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
