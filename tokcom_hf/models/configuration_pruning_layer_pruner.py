"""Configuration of `LayerPruner`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pruning_shapes import check_architecture, check_heads
from .shared_removed_fields import take_removed

# Removed fields and their former defaults.
REMOVED = {"min_tokens": 1}


@strict
class LayerPrunerConfig(PreTrainedConfig):
    """Stage 2: heads before chosen layers of the language model drop vision tokens. The defaults are the documented numbers.

    What you will most likely change:
        hidden_size: the language model's width.
        layers: prune before these layers, rising numbers from 0 on; None: the documented [10, 20, 31]. Earlier layers save
            more FLOPs and see less of the text when they decide.
        keep_tokens: tokens left per image after each of them, for example `[96, 48]`; None uses `keep_ratio`.
        keep_ratio: share of the arriving tokens that a layer keeps: one number for all layers (0.5 at three layers leaves
            1/2, 1/4, 1/8), or one per layer (`[0.7, 0.5, 0.3]` leaves 0.7, 0.35, 0.105).

    Kind:
        pruner_type: `cross_attention` (vision tokens attend to the question) or `simple` (each token alone).
        selection: `topk` keeps exactly the budget; `threshold` keeps tokens of probability > 0.5, and at least one per
            image, so that the number depends on the image.
        architecture: `normalized` heads have LayerNorms and a residual connection around the attention; `documented` heads
            have neither, and their masks are Gumbel-softmax([0, logit] / temperature) with noise of scale 1.
        internal_size, num_attention_heads: width and attention heads of each pruning head.
        scorer_size: hidden width of the last two layers; `internal_size` where None.
        gumbel_noise: add noise to the logits in training, so that the heads also try tokens that they do not rank highest.
        straight_through: train on the hard decision with the gradient of the soft one. A soft mask of 0.001 still lets
            a sharply attended token through, so heads trained on soft masks may drop tokens that the model still reads.
        initializer_range: standard deviation of initial linear weights.
    """

    model_type = "tokcom_layer_pruner"

    hidden_size: int = 4096
    layers: list[int] | None = None
    pruner_type: str = "cross_attention"
    selection: str = "topk"
    keep_tokens: list[int] | None = None
    keep_ratio: float | int | list[float | int] = 0.5
    architecture: str = "normalized"
    internal_size: int = 512
    scorer_size: int | None = None
    num_attention_heads: int = 4
    gumbel_noise: bool = True
    straight_through: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        take_removed(kwargs, REMOVED)
        if self.layers is None:
            self.layers = [10, 20, 31]
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise ValueError(f"layers must be rising layer numbers from 0 on, got {self.layers}.")
        if self.pruner_type not in ("cross_attention", "simple"):
            raise ValueError(f"pruner_type must be cross_attention or simple, got {self.pruner_type!r}.")
        check_architecture(self.architecture)
        if self.selection not in ("topk", "threshold"):
            raise ValueError(f"selection must be topk or threshold, got {self.selection!r}.")
        ratios = self.keep_ratios
        if len(ratios) != len(self.layers):
            raise ValueError(
                f"keep_ratio must be one number, or one per layer {self.layers}: {len(self.layers)}, got {self.keep_ratio}."
            )
        if not all(0.0 < ratio <= 1.0 for ratio in ratios):
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")
        tokens = self.keep_tokens
        if tokens is not None and isinstance(self.keep_ratio, list):
            raise ValueError(
                f"keep_tokens={tokens} and keep_ratio={self.keep_ratio} are two schedules; give one of them "
                "(keep_tokens: null drops the configuration's numbers)."
            )
        if tokens is not None and (len(tokens) != len(self.layers) or sorted(tokens, reverse=True) != list(tokens)):
            raise ValueError(f"keep_tokens needs one falling number per layer {self.layers}, got {tokens}.")
        if tokens is not None and tokens[-1] < 1:
            raise ValueError(f"keep_tokens must be at least 1, got {tokens}.")
        check_heads(self.internal_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    @property
    def keep_ratios(self) -> list[float]:
        """The share of arriving tokens that each layer of `layers` keeps."""
        return (
            list(self.keep_ratio) if isinstance(self.keep_ratio, list) else [self.keep_ratio] * len(self.layers or ())
        )
