"""`LayerPruner`: selects the vision tokens that chosen layers keep.

    logit = score(token + Attention(token, question)), plus logistic noise · temperature in training
    keep = the `budget` highest logits of each image
    soft mask = σ((logit − level) / temperature), with `level` midway between the last kept and the first dropped logit

With selection `threshold` the level is 0, and tokens above it are kept.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_pruning_layer_pruner import LayerPrunerConfig
from .pruning_question_attention import QuestionAttention
from .pruning_stage import PruningStage

# Mask of a dropped token in straight-through training: sharp attention still sees a token at 1e-6, and 1 / mask must be
# finite.
DROPPED = 1e-30


@dataclass
class LayerPrunerOutput(ModelOutput):
    """Result of `LayerPruner`.

    Attributes:
        keep_logits: `(batch, n)`, without noise; selection `threshold` keeps tokens whose logit is above 0.
        keep_mask: bool `(batch, n)`, the hard decision.
        soft_mask: `(batch, n)` in [0, 1], the decision's differentiable relaxation at the given temperature.
        target: `(batch,)`, number of tokens that the budget allows for all images of a row.
    """

    keep_logits: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    soft_mask: torch.Tensor | None = None
    target: torch.Tensor | None = None


class PrunerHead(nn.Module):
    """The scorer of one layer: hidden states `(batch, n, hidden)` to logits `(batch, n)`."""

    def __init__(self, config: LayerPrunerConfig):
        super().__init__()
        size, hidden = config.internal_size, config.scorer_size or config.internal_size
        self.residual = config.architecture != "documented"
        norm = nn.LayerNorm if self.residual else nn.Identity
        self.vision_norm = norm(config.hidden_size)
        self.vision_proj = nn.Linear(config.hidden_size, size)
        if config.pruner_type == "cross_attention":
            self.question_norm = norm(config.hidden_size)
            self.question_proj = nn.Linear(config.hidden_size, size)
            self.attention = QuestionAttention(config)
        self.score = nn.Sequential(norm(size), nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, vision_hidden, question_embeddings=None, question_mask=None) -> torch.Tensor:
        # Heads compute in their own dtype: float32 also over a bfloat16 VLM.
        dtype = self.vision_proj.weight.dtype
        tokens = self.vision_proj(self.vision_norm(vision_hidden.to(dtype)))
        if hasattr(self, "attention"):
            if question_embeddings is None:
                raise ValueError("pruner_type 'cross_attention' needs question_embeddings.")
            question = self.question_proj(self.question_norm(question_embeddings.to(dtype)))
            attended = self.attention(tokens, question, question_mask)
            tokens = tokens + attended if self.residual else attended
        return self.score(tokens).squeeze(-1).float()


class LayerPruner(PruningStage):
    """Keep/drop heads, one per layer in `config.layers`."""

    config: LayerPrunerConfig
    config_class = LayerPrunerConfig
    main_input_name = "vision_hidden"

    def __init__(self, config: LayerPrunerConfig):
        super().__init__(config)
        self.heads = nn.ModuleDict({str(layer): PrunerHead(config) for layer in config.layers})
        self.post_init()

    def forward(
        self,
        layer_index: int,
        vision_hidden: torch.Tensor,
        question_embeddings: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        temperature: float | None = None,
        return_dict: bool | None = None,
    ) -> LayerPrunerOutput | tuple:
        """Selects the tokens that layer `layer_index` keeps.

        Args:
            layer_index: one of `config.layers`.
            vision_hidden: `(batch, n, hidden_size)`.
            question_embeddings: `(batch, q, hidden_size)`, needed for `pruner_type="cross_attention"`.
            question_mask: `(batch, q)`, 1 on tokens of the question.
            vision_mask: bool `(batch, n)`, False on padding, which is never kept.
            images: `(batch, n)`, number of each token's image; the budget is per image. None: one image per row.
            temperature: scale of the soft mask, and of the noise in training; > 0. None: the module's `temperature`.
            return_dict: False for a tuple.

        Raises:
            ValueError: there is no head for that layer, or the question is missing.
        """
        if str(layer_index) not in self.heads:
            raise ValueError(f"There is no head for layer {layer_index}; heads are at {self.config.layers}.")
        logits = self.heads[str(layer_index)](vision_hidden, question_embeddings, question_mask)
        real = torch.ones_like(logits, dtype=torch.bool) if vision_mask is None else vision_mask.bool()
        images = torch.zeros_like(logits, dtype=torch.long) if images is None else images
        temperature = max(float(self.temperature if temperature is None else temperature), 1e-6)
        noisy = logits
        if self.training and self.config.gumbel_noise:
            # The noise of keep minus that of drop: the difference of two Gumbel variables is one logistic variable.
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            scale = 1.0 if self.config.architecture == "documented" else temperature
            noisy = logits + scale * (uniform.log() - (-uniform).log1p())
        keep = torch.zeros_like(real)
        threshold = torch.zeros_like(logits)
        target = torch.zeros_like(logits[:, 0])
        for image in range(int(images.max()) + 1 if images.numel() else 0):
            members = real & (images == image)
            wanted = self._budget(layer_index, members.sum(-1))
            target = target + wanted
            if self.config.selection == "threshold":
                # Every image keeps at least its best token.
                at_least = members.sum(-1).clamp(max=1)
                chosen = members & ((noisy > 0) | _top(noisy, members, at_least)[0])
                keep |= chosen
                continue
            chosen, level = _top(noisy, members, wanted)
            keep |= chosen
            threshold = torch.where(members, level[:, None], threshold)
        if self.training and self.config.straight_through:
            gate = torch.sigmoid((noisy - threshold) / max(temperature, 1.0))
            soft = _straight_through(keep, gate) * real
        else:
            soft = torch.sigmoid((noisy - threshold) / temperature) * real
        output = LayerPrunerOutput(keep_logits=logits, keep_mask=keep, soft_mask=soft, target=target)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _budget(self, layer_index: int, tokens: torch.Tensor) -> torch.Tensor:
        """How many of `tokens` `(batch,)` to keep: at least 1, at most all."""
        place = self.config.layers.index(layer_index)
        if self.config.keep_tokens is None:
            wanted = (self.config.keep_ratios[place] * tokens).round().long()
        else:
            wanted = torch.full_like(tokens, self.config.keep_tokens[place])
        return torch.minimum(wanted.clamp(min=1), tokens)


def _straight_through(keep: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Forward 1 where kept and nearly 0 where dropped; backward the gradient of `gate`, bounded per row.

    The derivative of the loss with respect to a dropped token's mask shows what keeping the token would change. It grows
    with exp(attention logit), so without a bound a few sharply attended tokens would dominate the gradient.
    """
    if gate.requires_grad:
        bound = 1.0 / len(gate)
        gate = gate * 1.0
        gate.register_hook(lambda g: g * (bound / g.abs().amax(-1, keepdim=True).clamp(min=bound)))
    return torch.where(keep, 1.0, DROPPED) + (gate - gate.detach())


def _top(logits: torch.Tensor, members: torch.Tensor, wanted: torch.Tensor):
    """Mask of the `wanted` highest members per row, and the level midway between the last kept and the first dropped one."""
    masked = logits.detach().masked_fill(~members, float("-inf"))
    ordered, order = masked.sort(-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    )
    keep = members & (rank < wanted[:, None])
    last = ordered.gather(-1, (wanted - 1).clamp(min=0)[:, None])
    following = ordered.gather(-1, wanted.clamp(max=logits.shape[1] - 1)[:, None])
    everything = (wanted >= members.sum(-1))[:, None]
    # Rows that drop nothing get a level far below every logit, so that their soft masks are 1.
    level = torch.where(everything, last - 1e4, (last + following) / 2)
    return keep, torch.nan_to_num(level, nan=0.0, posinf=0.0, neginf=0.0).squeeze(-1)
