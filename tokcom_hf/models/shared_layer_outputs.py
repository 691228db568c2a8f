"""`return_dict`, `output_hidden_states` and `output_attentions` as the models here take them.

transformers has decorators for both (`can_return_tuple`, `capture_outputs`). The first puts a frame around `forward`, which
doubles the graph breaks of torch.compile; the second records by hooks that a compiled model shares among threads. Here the
arguments are named in `forward`, and layer outputs are handed from layer to layer: nothing is kept on a module.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


def as_asked(output: ModelOutput, config, return_dict: bool | None) -> ModelOutput | tuple:
    """The output, or a tuple of what is in it where `return_dict`, or the config where it is None, says False."""
    named = config.return_dict if return_dict is None else return_dict
    return output if named else output.to_tuple()


@dataclass
class LayerRecord:
    """Collects what the caller asked for; `hidden_states` and `attentions` are None where they were not asked for."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None

    @classmethod
    def asked(cls, config, output_hidden_states: bool | None, output_attentions: bool | None) -> "LayerRecord":
        """An empty record of what the arguments, or the config where they are None, ask for.

        Raises:
            ValueError: attention weights of an implementation that does not compute them.
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
        """Keeps the hidden states behind a stack of layers and its final norm."""
        if self.hidden_states is not None:
            self.hidden_states.append(last)

    def fields(self) -> dict[str, tuple[torch.Tensor, ...] | None]:
        """`hidden_states` and `attentions` of a model's output."""
        return {name: None if kept is None else tuple(kept) for name, kept in vars(self).items()}


def refuse_layer_outputs(
    config, output_hidden_states: bool | None, output_attentions: bool | None, instead: str
) -> None:
    """Raises ValueError where the arguments, or the config where they are None, ask for outputs that a model has not.

    instead: what the caller may use, a sentence.
    """
    for name, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
        if getattr(config, name) if value is None else value:
            raise ValueError(f"{name}=True: {instead}")
