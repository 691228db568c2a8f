"""`PruningDiscriminator`: real (unpruned) or fake (pruned), from hidden states at answer positions."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pruning_discriminator import PruningDiscriminatorConfig
from .shared_strict_loading import StrictLoading

# As many as spectral_norm itself begins with.
POWER_ITERATIONS = 15


@dataclass
class PruningDiscriminatorOutput(ModelOutput):
    """Result of `PruningDiscriminator` with `return_dict=True`: `logits` `(batch,)`."""

    logits: torch.Tensor | None = None


class PruningDiscriminator(StrictLoading):
    """One small network per layer read; their logits are averaged."""

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
            # Its weight is computed from another tensor, which may be elsewhere while a folder is loaded; it was drawn
            # where the layer was made.
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Draws all weights anew, for the documented re-initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Its `weight` is computed anew at every reading: only the tensor behind it can be drawn.
                weight = module.parametrizations.weight.original
                fresh = nn.Linear(module.in_features, module.out_features, device=weight.device, dtype=weight.dtype)
                weight.copy_(fresh.weight)
                module.bias.copy_(fresh.bias)
                for _ in range(POWER_ITERATIONS):
                    module.weight  # noqa: B018 (each reading in training is a power iteration towards the new norm)

    def forward(
        self, hidden_states: list[torch.Tensor], answer_mask: torch.Tensor, return_dict: bool | None = None
    ) -> torch.Tensor | tuple | PruningDiscriminatorOutput:
        """Logit of "unpruned" per row.

        Args:
            hidden_states: one `(batch, length, hidden)` per layer in `config.layers`.
            answer_mask: `(batch, length)`, 1 at answer positions.
            return_dict: None gives the bare logits, False a tuple of them, True an output object.

        Returns:
            `(batch,)` logits, the mean over answer positions and layers.
        """
        if len(hidden_states) != len(self.networks):
            raise ValueError(f"Expected {len(self.networks)} hidden states, got {len(hidden_states)}.")
        weight = answer_mask.float()
        total = weight.sum(-1).clamp(min=1)
        dtype = next(self.networks.parameters()).dtype
        logits = [net(h.to(dtype)).squeeze(-1).float() for net, h in zip(self.networks, hidden_states)]
        mean = torch.stack([(logit * weight).sum(-1) / total for logit in logits]).mean(0)
        if return_dict is None:
            return mean
        return PruningDiscriminatorOutput(logits=mean) if return_dict else (mean,)
