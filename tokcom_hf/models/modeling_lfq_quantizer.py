"""`LFQQuantizer`: vision features to binary codes and on to embeddings of a language model, without a codebook.

    logits = GroupNorm(Linear(Transformer(features)))
    bit_i = [logit_i > 0], with the gradient of σ(logit_i) (straight-through)
    embedding = scale · MLP(2 · bits − 1) + shift
    loss = |embedding − target|² / |target|² + 0.1 · (E[H(p)] − H(E[p])) / (output_dim · ln 2),  p = p(code | feature)

Embeddings depend on the code alone, so that a code that a language model generates decodes like one of an image.

Source: lookup-free quantization 2310.05737 (MAGVIT-v2).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .configuration_lfq_quantizer import LFQConfig
from .lfq_blocks import NORM_EPS, LFQBlock, rotary_2d
from .lfq_matching import match_features, whitening_of  # noqa: F401 (whitening_of: its former place)
from .lfq_rows import weights_at_hand
from .shared_bit_entropy import factorised_entropy
from .shared_strict_loading import StrictLoading
from .vqgan_code_search import all_reduce, world_size

ROPE_THETA = 10000.0
# Temperature T of the bit probabilities σ(logit / T) in the entropy loss. Below 1, small logits already count as sure bits.
ENTROPY_TEMPERATURE = 0.25
# Weight of the entropy loss in `.loss`; the reconstruction loss has weight 1.
ENTROPY_WEIGHT = 0.1


@dataclass
class LFQQuantizerOutput(ModelOutput):
    """Result of `LFQQuantizer`.

    Attributes:
        loss: reconstruction_loss + 0.1 · entropy_loss.
        embeddings: `(batch, n, llm_hidden_size)`, with a straight-through gradient to the features.
        codes: int64 `(batch, n, output_dim)` of 0 and 1.
        entropy_loss: (mean entropy of a feature's code − entropy of the mean code) / (output_dim · ln 2), in [−1, 1]; −1
            where the bits of every feature are certain and all codes are equally frequent.
        reconstruction_loss: mean squared error of embeddings to targets, divided by the targets' mean square.
        sample_entropy, batch_entropy: the two entropies in nats.
        logits: float32 `(batch, n, output_dim)`, logits of the bits.
        hidden_states: with `output_hidden_states=True`, `(batch, n, width)` before the first block and after each; in the
            `linear` variant the normalised features alone.
    """

    loss: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    sample_entropy: torch.Tensor | None = None
    batch_entropy: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class LFQQuantizer(StrictLoading):
    """Features `(batch, n, input_size)` ↔ codes `(batch, n, output_dim)` → embeddings `(batch, n, llm_hidden_size)`."""

    config: LFQConfig
    config_class = LFQConfig
    base_model_prefix = "lfq"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LFQBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LFQConfig):
        super().__init__(config)
        self.input_norm = nn.LayerNorm(config.input_size, eps=NORM_EPS)
        width = config.input_size
        if config.variant == "transformer":
            width = config.hidden_size
            self.input_proj = nn.Linear(config.input_size, width)
            self.blocks = nn.ModuleList(LFQBlock(config) for _ in range(config.num_hidden_layers))
            self.output_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.to_bits = nn.Linear(width, config.output_dim)
        self.from_bits = nn.Sequential(
            nn.Linear(config.output_dim, config.llm_hidden_size),
            nn.GELU(),
            nn.Linear(config.llm_hidden_size, config.llm_hidden_size),
        )
        # `match_features` sets these to the scale and mean of the features, which optimizer steps would take long to reach.
        self.embedding_scale = nn.Parameter(torch.ones(config.llm_hidden_size))
        self.embedding_shift = nn.Parameter(torch.zeros(config.llm_hidden_size))
        self.post_init()

    # ---------------------------------------------------------------- features → codes → embeddings
    def bit_logits(
        self,
        features: torch.Tensor,
        grid: tuple[int, int] | None = None,
        hidden: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Features `(batch, n, input_size)` → float32 logits `(batch, n, output_dim)`; a bit is 1 where its logit > 0.

        Args:
            features: vision features.
            grid: (rows, columns) of n features that are not a square.
            hidden: list to which the hidden states are appended.
        """
        hidden = [] if hidden is None else hidden
        grid = self._check_features(features, grid)
        hidden_states = self.input_norm(features.to(self.input_norm.weight.dtype))
        if self.config.variant == "transformer":
            hidden_states = self.input_proj(hidden_states)
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            positions = rotary_2d(grid, head_dim, ROPE_THETA, hidden_states.device, hidden_states.dtype)
            for block in self.blocks:
                hidden.append(hidden_states)
                hidden_states = block(hidden_states, positions)
            hidden.append(hidden_states)
            hidden_states = self.output_norm(hidden_states)
        else:
            hidden.append(hidden_states)
        logits = self.to_bits(hidden_states).float()
        if self.config.group_norm:
            with torch.autocast(logits.device.type, enabled=False):
                logits = F.group_norm(logits.transpose(1, 2), 1, eps=NORM_EPS).transpose(1, 2)
        return logits

    @torch.no_grad()
    def encode(self, features: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Features `(batch, n, input_size)` → int64 codes `(batch, n, output_dim)` of 0 and 1."""
        return (self.bit_logits(features, grid) > 0).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(..., output_dim)`, where a value above 0 is a 1, → embeddings `(..., llm_hidden_size)`.

        Raises:
            ValueError: the last dimension is not output_dim.
        """
        if codes.ndim < 1 or codes.shape[-1] != self.config.output_dim:
            raise ValueError(
                f"Codes must end in output_dim={self.config.output_dim} bits, got shape {tuple(codes.shape)}."
            )
        return self._embed((codes > 0).to(torch.float32))

    @torch.no_grad()
    def match_features(self, features: torch.Tensor, grid: tuple[int, int] | None = None) -> None:
        """Fits freshly drawn weights to features `(batch, n, input_size)` at both ends; call it once, before training.

        The first layer whitens the features (regularised), so that small differences that matter, such as a dot on an
        object, move bits nearly as readily as large ones. Where the widths agree, embeddings get the features' scale, and
        the last layer becomes the ridge regression of the features on its inputs: freshly drawn embeddings are too small
        for a language model that was trained on features.

        Raises:
            ValueError: features of a wrong shape.
        """
        self._check_features(features, grid)
        match_features(self, features, grid)

    def _embed(self, bits: torch.Tensor) -> torch.Tensor:
        # ±1 instead of 0 and 1, so that no code is the zero vector.
        embeddings = self.from_bits((2 * bits - 1).to(self.from_bits[0].weight.dtype))
        # accelerate loads offloaded weights in `forward` only, and `decode` runs outside of it.
        with weights_at_hand(self):
            return embeddings * self.embedding_scale + self.embedding_shift

    def forward(
        self,
        features: torch.Tensor,
        targets: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        return_loss: bool = True,
    ) -> LFQQuantizerOutput | tuple:
        """Quantizes features.

        Args:
            features: `(batch, n, input_size)`.
            targets: `(batch, n, llm_hidden_size)`, the language model's input without quantization, which the embeddings are
                trained to match. None: the features where the widths agree; otherwise the reconstruction loss is 0.
            grid: (rows, columns) of n features that are not a square.
            output_hidden_states: also return the hidden states.
            return_dict: False for a tuple without the fields that are None.
            return_loss: False leaves losses and entropies out. (`Trainer` needs this argument to evaluate by `.loss`.)

        Raises:
            ValueError: features or targets of a wrong shape, or `output_attentions`.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("LFQQuantizer keeps no attentions; leave output_attentions out.")
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden: list[torch.Tensor] | None = [] if wants_states else None
        logits = self.bit_logits(features, grid, hidden)
        probability = logits.sigmoid()
        codes = (logits > 0).long()
        # In this order the sum is exactly 0 or 1, so that embeddings equal `decode(codes)` bit for bit.
        bits = probability + (codes - probability).detach()
        embeddings = self._embed(bits)
        losses = self._losses(logits, embeddings, features, targets) if return_loss else {}
        output = LFQQuantizerOutput(
            embeddings=embeddings,
            codes=codes,
            logits=logits,
            hidden_states=None if hidden is None else tuple(hidden),
            **losses,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _losses(self, logits, embeddings, features, targets) -> dict[str, torch.Tensor]:
        """The losses and entropies of `LFQQuantizerOutput`, by name."""
        with torch.autocast(logits.device.type, enabled=False):
            scaled = logits.flatten(0, 1) / ENTROPY_TEMPERATURE
            per_sample, batch = factorised_entropy(scaled, across_ranks=self.training)
            entropy_loss = (per_sample - batch) / (self.config.output_dim * math.log(2))
            reconstruction_loss = self._reconstruction_loss(embeddings, features, targets)
        return {
            "loss": reconstruction_loss + ENTROPY_WEIGHT * entropy_loss,
            "entropy_loss": entropy_loss,
            "reconstruction_loss": reconstruction_loss,
            "sample_entropy": per_sample.detach(),
            "batch_entropy": batch.detach(),
        }

    def _reconstruction_loss(self, embeddings, features, targets) -> torch.Tensor:
        if targets is None:
            if self.config.input_size != self.config.llm_hidden_size:
                return embeddings.new_zeros((), dtype=torch.float32)
            targets = features
        if targets.shape != embeddings.shape:
            raise ValueError(f"targets must have shape {tuple(embeddings.shape)}, got {tuple(targets.shape)}.")
        targets = targets.detach().float()
        scale = targets.square().mean()
        if self.training:
            # One scale for all ranks, so that several ranks compute the same loss as one process.
            scale = all_reduce(scale.clone()) / world_size()
        return F.mse_loss(embeddings.float(), targets) / scale.clamp_min(1e-12)

    def _check_features(self, features: torch.Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        config = self.config
        if features.ndim != 3 or features.shape[-1] != config.input_size:
            raise ValueError(
                f"Features must be (batch, n, input_size={config.input_size}), got shape {tuple(features.shape)}."
            )
        length = features.shape[1]
        if config.num_tokens is not None and length != config.num_tokens:
            raise ValueError(
                f"This quantizer takes num_tokens={config.num_tokens} features per image, got {length}; set num_tokens "
                "to None for any number."
            )
        if grid is not None:
            if grid[0] * grid[1] != length:
                raise ValueError(f"grid {tuple(grid)} holds {grid[0] * grid[1]} features, got {length}.")
            return grid
        side = math.isqrt(length)
        if side * side != length:
            if config.variant == "linear":
                return (1, length)
            raise ValueError(
                f"{length} features are no square grid; name its rows and columns with grid=(rows, columns)."
            )
        return (side, side)
