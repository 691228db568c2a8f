"""`PruningDiscriminator`: tells hidden states of the unpruned model (real) from those of the pruned one (fake)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pruning_discriminator import PruningDiscriminatorConfig
from .shared_strict_loading import StrictLoading

# Power iterations that estimate the norm of fresh weights, as many as torch's spectral_norm starts with.
POWER_ITERATIONS = 15


@dataclass
class PruningDiscriminatorOutput(ModelOutput):
    """Result of `PruningDiscriminator` with `return_dict=True`: `logits` `(batch,)`."""

    logits: torch.Tensor | None = None


class PruningDiscriminator(StrictLoading):
    """One small network for each hidden state in `config.layers`; the logit is the mean over networks."""

    config: PruningDiscriminatorConfig
    config_class = PruningDiscriminatorConfig
    main_input_name = "hidden_states"

    def __init__(self, config: PruningDiscriminatorConfig):
        super().__init__(config)
        self.networks = nn.ModuleList([self._network() for _ in config.layers])
        self.post_init()

    def _network(self) -> nn.Sequential:
        config = self.config
        return nn.Sequential(
            nn.LayerNorm(config.hidden_size, elementwise_affine=False),
            spectral_norm(nn.Linear(config.hidden_size, config.internal_size)),
            nn.LeakyReLU(0.2),
            nn.Dropout(config.dropout),
            spectral_norm(nn.Linear(config.internal_size, config.internal_size)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(config.internal_size, 1)),
        )

    def _init_weights(self, module: nn.Module) -> None:
        if is_parametrized(module):
            # `spectral_norm` computes the weight from another tensor, which was drawn when the layer was built, and which
            # may be on the meta device while a folder is loaded.
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Draws all weights anew, which is the documented re-initialisation in training."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # `module.weight` is computed at every access; the stored tensor is `original`.
                weight = module.parametrizations.weight.original
                fresh = nn.Linear(module.in_features, module.out_features, device=weight.device, dtype=weight.dtype)
                weight.copy_(fresh.weight)
                module.bias.copy_(fresh.bias)
                for _ in range(POWER_ITERATIONS):
                    module.weight  # noqa: B018 (in training every access is one power iteration)

    def forward(
        self, hidden_states: list[torch.Tensor], answer_mask: torch.Tensor, return_dict: bool | None = None
    ) -> torch.Tensor | tuple | PruningDiscriminatorOutput:
        """One logit per row, high for the unpruned model.

        Args:
            hidden_states: one `(batch, length, hidden)` per layer in `config.layers`.
            answer_mask: `(batch, length)`, 1 at answer positions.
            return_dict: None returns the logits tensor, False a tuple with it, True an output object.

        Returns:
            `(batch,)` logits, means over answer positions and layers.

        Raises:
            ValueError: the number of hidden states is not that of `config.layers`.
        """
        if len(hidden_states) != len(self.networks):
            raise ValueError(
                f"Expected {len(self.networks)} hidden states, one per layer in {self.config.layers}, got "
                f"{len(hidden_states)}."
            )
        weight = answer_mask.float()
        total = weight.sum(-1).clamp(min=1)
        dtype = next(self.networks.parameters()).dtype
        logits = [net(h.to(dtype)).squeeze(-1).float() for net, h in zip(self.networks, hidden_states)]
        mean = torch.stack([(logit * weight).sum(-1) / total for logit in logits]).mean(0)
        if return_dict is None:
            return mean
        return PruningDiscriminatorOutput(logits=mean) if return_dict else (mean,)
