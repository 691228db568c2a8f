"""The arguments `return_dict`, `output_hidden_states` and `output_attentions` of the models' `forward`.

transformers' decorators do not fit here: `can_return_tuple` adds a frame around `forward`, which doubles the graph breaks of
torch.compile, and `capture_outputs` records by hooks, which threads share in a compiled model. Here nothing is stored on a
module: `forward` names the arguments, and passes a record from layer to layer.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers.utils import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)


def as_asked(output: Output, config, return_dict: bool | None) -> Output | tuple:
    """The output, or its values as a tuple where `return_dict` (the config's, where None) is False."""
    named = config.return_dict if return_dict is None else return_dict
    return output if named else output.to_tuple()


@dataclass
class LayerRecord:
    """Hidden states and attention weights of the layers; None where the caller does not want them."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None

    @classmethod
    def asked(cls, config, output_hidden_states: bool | None, output_attentions: bool | None) -> "LayerRecord":
        """An empty record of what the arguments ask for, or the config where an argument is None.

        Raises:
            ValueError: attention weights are wanted, but the attention implementation does not compute them.
        """
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = config.output_attentions if output_attentions is None else output_attentions
        if weights and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attention weights, which attn_implementation={config._attn_implementation!r} "
                "does not compute; call model.set_attn_implementation('eager') first."
            )
        return cls([] if states else None, [] if weights else None)

    def add(self, hidden_states: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Keeps a layer's input (batch, length, hidden) and attention weights (batch, heads, length, keys)."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_states)
        if self.attentions is not None and weights is not None:
            self.attentions.append(weights)

    def end(self, last: torch.Tensor) -> None:
        """Keeps the hidden states after a stack of layers and its final norm."""
        if self.hidden_states is not None:
            self.hidden_states.append(last)

    def fields(self) -> dict[str, tuple[torch.Tensor, ...] | None]:
        """`hidden_states` and `attentions` of a model's output."""
        return {name: None if kept is None else tuple(kept) for name, kept in vars(self).items()}


def refuse_layer_outputs(
    config, output_hidden_states: bool | None, output_attentions: bool | None, instead: str
) -> None:
    """Raises ValueError where layer outputs are wanted, by the arguments or by the config where they are None.

    instead: sentence for the error, which names what the caller can use.
    """
    for name, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
        if getattr(config, name) if value is None else value:
            raise ValueError(f"{name}=True: {instead}")
