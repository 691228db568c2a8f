"""`TokenMerger`: N vision tokens in, M merged tokens out, chosen with the question in mind.

The kept tokens are centres. Every token spreads itself over the centres by similarity, each centre becomes the weighted
mean of what it received (weights divided by their **column** sums, so norms stay as they were). The choice of centres
is a hard top-k; a straight-through factor on each centre's column gives the scorer its gradient.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .configuration_token_merger import TokenMergerConfig
from .question_attention import QuestionAttention
from .strict_loading import StrictLoading


@dataclass
class TokenMergerOutput(ModelOutput):
    """Result of `TokenMerger`.

    Attributes:
        merged_features: `(batch, m, d)`.
        merge_weights: `(batch, n, m)`, columns sum to 1.
        keep_index: `(batch, m)`, sorted places of the centres among the n tokens.
        keep_mask: bool `(batch, m)`, False on slots beyond a row's own m (question-dependent ratio only).
        scores: `(batch, n)` importance.
        sparsity_loss: mean entropy (nats) of the assignment of a token to centres, plus the predicted share kept.
    """

    merged_features: torch.Tensor | None = None
    merge_weights: torch.Tensor | None = None
    keep_index: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sparsity_loss: torch.Tensor | None = None


class TokenMerger(StrictLoading):
    """Merges vision tokens before the language model."""

    config: TokenMergerConfig
    config_class = TokenMergerConfig
    main_input_name = "vision_features"
    # Its small attention to the question is torch's fused one, unless `eager` is asked for.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: TokenMergerConfig):
        super().__init__(config)
        size = config.internal_size
        self.feature_norm = nn.LayerNorm(config.feature_size)
        self.feature_proj = nn.Linear(config.feature_size, size)
        # Built only where used: an unused parameter would stop distributed training.
        if config.merger_type != "simple" or config.question_dependent_ratio:
            self.question_proj = nn.Linear(config.question_size, size)
            self.question_norm = nn.LayerNorm(size)
        if config.merger_type == "question_aware":
            self.question_attention = QuestionAttention(config)
        if config.merger_type == "fixed_pooling":
            self.queries = nn.Parameter(torch.empty(config.max_tokens, size))
        else:
            self.scorer = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))
        self.similarity_proj = nn.Linear(size, size, bias=False)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.attention_weight = nn.Parameter(torch.empty(())) if config.attention_guided else None
        self.ratio_head = nn.Linear(size, 1) if config.question_dependent_ratio else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.log_scale.fill_(float(torch.tensor(float(self.config.initial_scale)).log()))
            if self.attention_weight is not None:
                self.attention_weight.fill_(1.0)
            if self.config.merger_type == "fixed_pooling":
                self.queries.normal_(0.0, 1.0)

    def tokens_kept(self, tokens: int) -> int:
        """M for an image of `tokens` tokens: at least 1, at most all of them."""
        return self.config.tokens_kept(tokens)

    def forward(
        self,
        vision_features: torch.Tensor,
        question_embeddings: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        attention_scores: torch.Tensor | None = None,
        temperature: float = 0.1,
        return_dict: bool | None = None,
    ) -> TokenMergerOutput | tuple:
        """Merges.

        Args:
            vision_features: `(batch, n, feature_size)`.
            question_embeddings: `(batch, q, question_size)`, needed unless `merger_type` is `simple`.
            question_mask: `(batch, q)`, 1 on real tokens.
            attention_scores: `(batch, n)` received attention, for `attention_guided`.
            temperature: of the Gumbel noise and of the straight-through factor while training; > 0.
            return_dict: False gives a tuple of what the output holds, in its order.
        """
        output = self._merge(vision_features, question_embeddings, question_mask, attention_scores, temperature)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _merge(self, vision_features, question_embeddings, question_mask, attention_scores, temperature):
        config = self.config
        count = self.tokens_kept(vision_features.shape[1])
        # The merger computes in its own precision, which may be higher than the features'.
        tokens = self.feature_proj(self.feature_norm(vision_features.to(self.log_scale.dtype)))
        question, pooled = self._question(question_embeddings, question_mask)
        if config.merger_type == "fixed_pooling":
            return self._pool(vision_features, tokens, pooled, count)
        if config.merger_type == "question_aware":
            tokens = tokens + self.question_attention(tokens, question, question_mask)
        scores = self.scorer(tokens).squeeze(-1).float()
        if self.attention_weight is not None:
            if attention_scores is None:
                raise ValueError("attention_guided=True needs attention_scores from the vision tower.")
            scores = scores + self.attention_weight * attention_scores.float().add(1e-6).log()
        noisy = scores
        if self.training and config.gumbel_noise:
            noisy = scores - temperature * torch.empty_like(scores).exponential_().log()
        ranked = noisy.argsort(-1, descending=True)
        index, order = ranked[:, :count].sort(-1)

        gate, alive = self._gates(noisy, ranked, order, count, pooled, temperature)
        units = F.normalize(self.similarity_proj(tokens).float(), dim=-1)
        centres = units.gather(1, index[..., None].expand(-1, -1, units.shape[-1]))
        logits = self.log_scale.exp() * units @ centres.transpose(1, 2)
        logits = logits.masked_fill(~alive[:, None], float("-inf"))
        assignment = logits.softmax(-1)
        entropy = -(assignment * assignment.clamp(min=1e-9).log()).sum(-1).mean()
        weights = assignment * gate[:, None]
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        # The column sums cancel the gate in the forward value (it is 1) and in part of its gradient; the factor below
        # passes the whole of it on.
        merged = (weights.transpose(1, 2).to(vision_features.dtype) @ vision_features) * gate[..., None].to(
            vision_features.dtype
        )
        sparsity = entropy
        if self.ratio_head is not None:
            sparsity = sparsity + self._ratio(pooled).mean()
        return TokenMergerOutput(
            merged_features=merged,
            merge_weights=weights,
            keep_index=index,
            keep_mask=alive,
            scores=scores,
            sparsity_loss=sparsity,
        )

    def _question(self, embeddings, mask):
        if embeddings is None:
            if self.config.merger_type != "simple" or self.ratio_head is not None:
                raise ValueError(f"merger_type {self.config.merger_type!r} needs question_embeddings.")
            return None, None
        if not hasattr(self, "question_proj"):
            return None, None
        question = self.question_norm(self.question_proj(embeddings.to(self.log_scale.dtype)))
        mask = torch.ones(question.shape[:2], device=question.device) if mask is None else mask
        weight = mask[..., None].to(question.dtype)
        return question, (question * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _ratio(self, pooled) -> torch.Tensor:
        low, high = self.config.min_ratio, self.config.merge_ratio
        return low + (high - low) * torch.sigmoid(self.ratio_head(pooled).float()).squeeze(-1)

    def _gates(self, scores, ranked, order, count, pooled, temperature):
        """Per centre a factor that is 1 forward and differentiable backward, and whether the slot is in use."""
        chosen = scores.gather(-1, ranked[:, :count])
        following = ranked[:, count : count + 1] if count < scores.shape[1] else ranked[:, -1:]
        threshold = (chosen[:, -1:] + scores.gather(-1, following)).detach() / 2
        soft = torch.sigmoid((chosen - threshold) / max(temperature, 0.05))
        alive = torch.ones_like(soft, dtype=torch.bool)
        if self.ratio_head is not None:
            wanted = self._ratio(pooled)[:, None] * scores.shape[1]
            rank = torch.arange(count, device=scores.device)
            alive = rank < wanted.round().clamp(min=1)
            soft = soft * torch.sigmoid((wanted - rank - 0.5) / max(temperature * count, 1.0))
        gate = torch.ones_like(soft) + soft - soft.detach()
        return gate.gather(-1, order), alive.gather(-1, order)

    def _pool(self, features, tokens, pooled, count):
        if count > self.config.max_tokens:
            raise ValueError(f"fixed_pooling holds max_tokens={self.config.max_tokens} queries, {count} are needed.")
        queries = F.normalize((self.queries[:count] + pooled[:, None]).float(), dim=-1)
        units = F.normalize(self.similarity_proj(tokens).float(), dim=-1)
        logits = self.log_scale.exp() * units @ queries.transpose(1, 2)
        weights = logits.softmax(1)
        merged = weights.transpose(1, 2).to(features.dtype) @ features
        # A pooled token has no place of its own: places are spread evenly, so that rotary positions stay in range.
        index = ((torch.arange(count, device=features.device) + 0.5) * features.shape[1] / count).long()
        entropy = -(weights * weights.clamp(min=1e-9).log()).sum(1).mean()
        return TokenMergerOutput(
            merged_features=merged,
            merge_weights=weights,
            keep_index=index.expand(len(features), -1),
            keep_mask=torch.ones(len(features), count, dtype=torch.bool, device=features.device),
            scores=logits.amax(-1),
            sparsity_loss=entropy,
        )
