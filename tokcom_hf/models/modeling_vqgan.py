"""VQGAN: a convolutional autoencoder whose latent grid is discrete (Esser et al. 2012.09841).

z = encoder(x);  codes, e = quantizer(z);  x̂ = decoder(z + sg(e − z))                  sg: stop-gradient
loss = l1_weight · |x̂ − x| + mse_weight · (x̂ − x)² + commitment_weight · (z − sg(e))² + entropy_weight · entropy
       + diversity_weight · diversity
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_vqgan import VQGANConfig
from .shared_layer_outputs import as_asked, refuse_layer_outputs
from .shared_strict_loading import StrictLoading
from .shared_tensor_checks import check_floats
from .vqgan_network import Decoder, Encoder, ResidualBlock, SpatialAttention  # noqa: F401 (importable from here, too)
from .vqgan_quantizers import EMAQuantizer, Quantizer, build_quantizer

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_vqgan import VQReconstructionPipeline  # noqa: F401


@dataclass
class VQGANOutput(ModelOutput):
    """Output of `VQGAN.forward`.

    loss: reconstruction + commitment_weight · commitment + entropy_weight · entropy + diversity_weight · diversity (scalar).
    reconstruction: `(batch, out_channels, height, width)`, trained towards [-1, 1].
    codes: `(batch, height / f, width / f)` int64.
    reconstruction_loss, commitment_loss, entropy_loss, diversity_loss: the unweighted terms (scalars).
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    diversity_loss: torch.Tensor | None = None


class VQGAN(StrictLoading):
    """Encoder, quantizer and decoder: images to a grid of discrete codes and back. `VQGANConfig` describes every setting."""

    config_class = VQGANConfig
    base_model_prefix = "vqgan"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["ResidualBlock", "SpatialAttention", "EMAQuantizer", "FSQQuantizer", "LFQQuantizerHead"]
    # Codes depend on differences of distances that bf16 cannot resolve.
    _keep_in_fp32_modules_strict = [r"quantizer\.(?!initialized|num_updates)"]
    # A folder saved with balance_rate=0 has no penalties; where it is loaded with another rate they start at zero.
    _keys_to_ignore_on_load_missing = [r"^quantizer\.penalty$"]

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quantizer = build_quantizer(config, config.latent_channels)
        self.decoder = Decoder(config)
        # Factor of `commitment_weight`, below 1 while the trainer warms it up.
        self.commitment_scale = 1.0
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Quantizer):
            # transformers calls this if the folder lacks one buffer; the buffers that were loaded must stay.
            buffers = [b for b in module.buffers(recurse=False) if getattr(b, "_is_hf_initialized", False)]
            loaded = [buffer.clone() for buffer in buffers]
            module.reset_buffers()
            for buffer, value in zip(buffers, loaded):
                buffer.copy_(value)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            # Called as `nn.init.NAME`: transformers replaces these functions by ones that skip loaded weights.
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encoder output with channels last, `(batch, height / f, width / f, latent_channels)`."""
        self._check_pixels(pixel_values)
        return self.encoder(pixel_values.to(self.dtype)).permute(0, 2, 3, 1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> VQGANOutput | tuple:
        """Reconstructs images and returns the named losses.

        Args:
            pixel_values: `(batch, in_channels, height, width)` in [-1, 1]; sides divisible by `downsample_factor`.
            labels: target images, `(batch, out_channels, height, width)`; None takes `pixel_values`.
            output_hidden_states, output_attentions: refused, because the model returns no outputs of its layers.
            return_dict: False returns a tuple; None takes the config's value.

        Raises:
            ValueError: a wrong rank, number of channels or size, or, in training, features that are NaN or infinite.
        """
        refuse_layer_outputs(
            self.config,
            output_hidden_states,
            output_attentions,
            "a VQGAN returns no outputs of its layers; features(pixel_values) are the encoder's.",
        )
        # `learns` is passed only where it matters: a user's own quantizer need not have this argument.
        options = {} if self._codebook_learns() else {"learns": False}
        quantized = self.quantizer(self.features(pixel_values), **options)
        reconstruction = self.decoder(quantized.embeddings.permute(0, 3, 1, 2))
        losses = self.losses(reconstruction, self._target(pixel_values, labels), quantized)
        output = VQGANOutput(reconstruction=reconstruction, codes=quantized.codes, **losses)
        return as_asked(output, self.config, return_dict)

    def _codebook_learns(self) -> bool:
        """Whether training moves the codebook; it stays while a peft adapter is trained, which does not save the codebook.

        Raises:
            ValueError: an adapter is trained before the codebook was placed on data.
        """
        # peft sets `peft_config` on the model, and wraps what is in `modules_to_save`.
        if not (hasattr(self, "peft_config") and isinstance(self.quantizer, Quantizer)):
            return True
        if self.training and isinstance(self.quantizer, EMAQuantizer) and not self.quantizer.initialized:
            raise ValueError(
                "An adapter does not save the codebook, and this one has not been placed on data yet; adapt a trained "
                "VQGAN, or name 'quantizer' in modules_to_save."
            )
        return False

    def losses(self, reconstruction: torch.Tensor, target: torch.Tensor, quantized) -> dict[str, torch.Tensor]:
        """The loss of `forward` and its unweighted terms, float32 scalars by their names in `VQGANOutput`."""
        config = self.config
        difference = reconstruction.float() - target.float()
        reconstruction_loss = config.l1_weight * difference.abs().mean()
        if config.mse_weight:
            reconstruction_loss = reconstruction_loss + config.mse_weight * difference.square().mean()
        loss = reconstruction_loss + config.entropy_weight * quantized.entropy_loss
        loss = loss + config.commitment_weight * self.commitment_scale * quantized.commitment_loss
        diversity = quantized.diversity_loss if config.diversity_weight else None
        if diversity is not None:
            loss = loss + config.diversity_weight * diversity
        return {
            "loss": loss,
            "reconstruction_loss": reconstruction_loss,
            "commitment_loss": quantized.commitment_loss,
            "entropy_loss": quantized.entropy_loss,
            "diversity_loss": diversity,
        }

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(batch, in_channels, height, width)` in [-1, 1] → their nearest codes `(batch, height / f, width / f)`.

        Raises:
            ValueError: a wrong rank, number of channels or size, or features that are NaN or infinite.
        """
        return self.quantizer.encode(self.features(pixel_values))

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(batch, h, w)` → images `(batch, out_channels, h · f, w · f)`, nominally in [-1, 1].

        Raises:
            TypeError: codes are not integers.
            ValueError: codes are not three-dimensional, or outside [0, codebook_size).
        """
        if not torch.is_tensor(codes):
            raise TypeError(f"codes must be a tensor (batch, h, w) of integers, got {type(codes).__name__}.")
        if codes.ndim != 3 or 0 in codes.shape:
            raise ValueError(f"codes must have shape (batch, h, w), none of them 0, got {tuple(codes.shape)}.")
        embeddings = self.quantizer.lookup(codes).to(self.decoder.conv_out.weight.dtype)
        return self.decoder(embeddings.permute(0, 3, 1, 2))

    def update_codebook(self, allow_reset: bool = True) -> None:
        """Moves the codebook once per optimizer step, for trainers that set `quantizer.update_in_forward = False`."""
        self.quantizer.update(allow_reset)

    def expand_codebook(self, codebook_size: int) -> None:
        """Grows an `ema` codebook; the old codes keep their ids and vectors.

        Raises:
            ValueError: the quantizer is not `ema`, or the new size is not larger or above 2^24.
        """
        if not isinstance(self.quantizer, EMAQuantizer):
            raise ValueError(f"Only the ema quantizer can expand its codebook, not {self.config.quantizer!r}.")
        if not self.config.codebook_size < codebook_size <= 1 << 24:
            raise ValueError(
                f"The new size must exceed {self.config.codebook_size} and be at most {1 << 24}, got {codebook_size}."
            )
        self.quantizer.expand(codebook_size)
        self.config.codebook_size = codebook_size

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        channels, factor = self.config.in_channels, self.config.downsample_factor
        shape = f"(batch, {channels}, height, width)"
        # In training the quantizer checks the features instead, on every device.
        check_floats(pixel_values, "pixel_values", shape, (None, channels, None, None), finite=not self.training)
        height, width = pixel_values.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"Height and width must be positive multiples of {factor}, got {height}×{width}; "
                "resize or crop the images (VQGANImageProcessor does)."
            )

    def _target(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        target = pixel_values if labels is None else labels
        if target.shape[1] != self.config.out_channels:
            raise ValueError(
                f"The model makes {self.config.out_channels} channels but the target has {target.shape[1]}; "
                "pass the target images as labels."
            )
        return target
