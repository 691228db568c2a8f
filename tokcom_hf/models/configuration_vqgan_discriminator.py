"""Configuration of `VQGANDiscriminator`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class VQGANDiscriminatorConfig(PreTrainedConfig):
    """A patch discriminator (Isola et al. 1611.07004): one logit per overlapping patch of the image.

    in_channels: channels of the images, 1 to 4.
    base_channels: width after the first convolution; each following one doubles it, up to eightfold.
    num_layers: convolutions of stride 2; each further one doubles the patch that a logit judges.
    """

    model_type = "tokcom_vqgan_discriminator"
    attribute_map = {"hidden_size": "base_channels", "num_channels": "in_channels", "num_hidden_layers": "num_layers"}

    in_channels: int = 3
    base_channels: int = 64
    num_layers: int = 3

    def __post_init__(self, **kwargs):
        # The base class would set these after the checks.
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))
        if self.in_channels not in (1, 2, 3, 4):
            raise ValueError(f"in_channels must be 1 to 4, got {self.in_channels}.")
        if self.base_channels < 1 or self.num_layers < 1:
            raise ValueError(
                f"base_channels and num_layers must be at least 1, got {self.base_channels} and {self.num_layers}."
            )
        super().__post_init__(**kwargs)
