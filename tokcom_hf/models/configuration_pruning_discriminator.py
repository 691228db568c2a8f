"""Configuration of `PruningDiscriminator`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .shared_removed_fields import take_removed

# Removed fields and their former defaults.
REMOVED = {"spectral_norm": True, "initializer_range": 0.02}


@strict
class PruningDiscriminatorConfig(PreTrainedConfig):
    """A discriminator between hidden states of the unpruned and of the pruned model, at answer positions.

    hidden_size: the language model's width.
    layers: hidden states of the language model that are compared, counted from the end; None: the documented [-1, -3, -5].
    internal_size: width of the discriminator's hidden layers.
    dropout: dropout probability behind the first hidden layer.
    """

    model_type = "tokcom_pruning_discriminator"

    hidden_size: int = 4096
    layers: list[int] | None = None
    internal_size: int = 512
    dropout: float | int = 0.1

    def __post_init__(self, **kwargs):
        take_removed(kwargs, REMOVED)
        if self.layers is None:
            self.layers = [-1, -3, -5]
        if not self.layers or any(layer >= 0 for layer in self.layers):
            raise ValueError(f"layers are counted from the end (-1 is the last), got {self.layers}.")
        super().__post_init__(**kwargs)
