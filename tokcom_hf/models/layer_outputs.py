"""`output_hidden_states` and `output_attentions` of the models in this folder: given, or refused in words.

transformers records them by hooks (`capture_outputs`), which share one name among all layers of a model; a VAE has an
encoder's and a decoder's, so here they are handed from layer to layer. Nothing is kept on a module.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class LayerRecord:
    """Collects what the caller asked for; `hidden_states` and `attentions` are None where they were not asked for."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = field(default=None)

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

    def empty(self) -> "LayerRecord":
        """A record of the same kinds for another stack of layers."""
        return LayerRecord(*(None if kept is None else [] for kept in (self.hidden_states, self.attentions)))

    def add(self, hidden_states: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Keeps a layer's input (batch, length, hidden) and attention weights (batch, heads, length, keys)."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_states)
        if self.attentions is not None and weights is not None:
            self.attentions.append(weights)

    def finished(self, last: torch.Tensor) -> tuple[tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Inputs of all layers and the `last` hidden states, behind the final norm; attention weights of all layers."""
        states = None if self.hidden_states is None else (*self.hidden_states, last)
        return states, None if self.attentions is None else tuple(self.attentions)


def refuse_layer_outputs(
    config, output_hidden_states: bool | None, output_attentions: bool | None, instead: str
) -> None:
    """Raises ValueError where the arguments, or the config where they are None, ask for outputs that a model has not.

    instead: what the caller may use, a sentence.
    """
    for name, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
        if getattr(config, name) if value is None else value:
            raise ValueError(f"{name}=True: {instead}")
