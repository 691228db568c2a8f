"""Patch discriminator of the VQGAN, a model of its own."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_vqgan_discriminator import VQGANDiscriminatorConfig
from .shared_layer_outputs import as_asked, refuse_layer_outputs
from .shared_strict_loading import StrictLoading


@dataclass
class VQGANDiscriminatorOutput(ModelOutput):
    """Output of `VQGANDiscriminator`: `logits` `(batch, 1, h, w)`, positive where a patch looks real."""

    logits: torch.Tensor | None = None


class VQGANDiscriminator(StrictLoading):
    """Tells real from reconstructed images, patch by patch.

    Its norm is GroupNorm, so that one forward may hold real and fake images without mixing their statistics.
    """

    config_class = VQGANDiscriminatorConfig
    base_model_prefix = "discriminator"
    main_input_name = "pixel_values"

    def __init__(self, config: VQGANDiscriminatorConfig):
        super().__init__(config)
        channels = config.base_channels
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            width = config.base_channels * min(2**layer, 8)
            stride = 2 if layer < config.num_layers else 1
            layers += [
                nn.Conv2d(channels, width, 4, stride, 1),
                nn.GroupNorm(math.gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> VQGANDiscriminatorOutput | tuple:
        """`(batch, in_channels, height, width)` in [-1, 1] → logits `(batch, 1, h, w)`.

        Raises:
            ValueError: the number of channels is wrong, images are too small for `num_layers`, or hidden states or
                attentions are wanted, which this model does not return.
        """
        refuse_layer_outputs(
            self.config,
            output_hidden_states,
            output_attentions,
            "the discriminator returns no outputs of its layers; register_forward_hook on model.layers[i] gives them.",
        )
        smallest = 3 * 2**self.config.num_layers
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.config.in_channels or min(shape[2:]) < smallest:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.config.in_channels}, height, width) with sides of at "
                f"least {smallest} for num_layers={self.config.num_layers}, got {shape}."
            )
        output = VQGANDiscriminatorOutput(logits=self.layers(pixel_values.to(self.dtype)))
        return as_asked(output, self.config, return_dict)
