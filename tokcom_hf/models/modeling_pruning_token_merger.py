"""`TokenMerger`: N vision tokens in, M merged tokens out, chosen with the question in mind.

    centres = the M highest of score(token + Attention(token, question)), plus Gumbel noise · temperature in training
    A_ij = softmax_j(scale · cos(token_i, centre_j))              how token i is shared among the centres
    merged_j = Σ_i A_ij · feature_i / Σ_i A_ij                    division by column sums keeps the norms of features

The choice of centres is a hard top-k; a straight-through factor on each centre's column gives the scorer a gradient. With
`architecture="documented"` assignment and merging follow the documented formulas (`TokenMergerConfig.architecture`).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_pruning_token_merger import TokenMergerConfig
from .pruning_merger_output import TokenMergerOutput
from .pruning_question_attention import QuestionAttention, QuestionGuide
from .pruning_question_ratio import confident_count, within
from .pruning_stage import PruningStage

# The parameter `confidence` is the logit of a probability divided by this number, so that a learning rate of 2e-5 moves the
# logit by 1 in 500 steps.
CONFIDENCE_SCALE = 100.0
# Number of learned queries of `fixed_pooling`, as many as an image of LLaVA-1.5 has tokens.
MAX_QUERIES = 576


class TokenMerger(PruningStage):
    """Merges the vision tokens of an image before the language model."""

    config: TokenMergerConfig
    config_class = TokenMergerConfig
    main_input_name = "vision_features"

    def __init__(self, config: TokenMergerConfig):
        super().__init__(config)
        size = config.internal_size
        documented, hidden = config.architecture == "documented", config.scorer_size or size
        # Modules exist only where they are used: DistributedDataParallel refuses parameters without a gradient.
        if not documented:
            self.feature_norm = nn.LayerNorm(config.feature_size)
        if not documented or config.merger_type == "question_aware":
            self.feature_proj = nn.Linear(config.feature_size, size)
        guided = config.attention_guided == "question"
        learned = config.question_dependent_ratio in (True, "learned")
        if config.merger_type != "simple" or learned or guided:
            self.question_proj = nn.Linear(config.question_size, size)
            self.question_norm = nn.Identity() if documented else nn.LayerNorm(size)
        if config.merger_type == "question_aware":
            self.question_attention = QuestionAttention(config)
        if config.merger_type == "fixed_pooling":
            self.queries = nn.Parameter(torch.empty(MAX_QUERIES, size))
        scored = size if hasattr(self, "feature_proj") else config.feature_size
        if config.merger_type != "fixed_pooling":
            self.scorer = nn.Sequential(nn.Linear(scored, hidden), nn.GELU(), nn.Linear(hidden, 1))
        if documented:
            self.q_proj = nn.Linear(config.feature_size, size)
            self.k_proj = nn.Linear(config.feature_size, size)
        else:
            self.similarity_proj = nn.Linear(size, size, bias=False)
            self.log_scale = nn.Parameter(torch.empty(()))
        self.attention_weight = nn.Parameter(torch.empty(())) if config.attention_guided else None
        self.question_guide = QuestionGuide(config, scored) if guided else None
        self.ratio_head = nn.Linear(size, 1) if learned else None
        confident = config.question_dependent_ratio == "confidence"
        self.confidence = nn.Parameter(torch.empty(())) if confident else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            if self.config.architecture == "normalized":
                self.log_scale.fill_(float(torch.tensor(float(self.config.initial_scale)).log()))
            if self.attention_weight is not None:
                self.attention_weight.fill_(1.0)
            if self.confidence is not None:
                # The initial probability is 0.9.
                self.confidence.fill_(math.log(9.0) / CONFIDENCE_SCALE)
            if self.config.merger_type == "fixed_pooling":
                self.queries.normal_(0.0, 1.0)

    def tokens_kept(self, tokens: int) -> int:
        """The most tokens that are left of an image of `tokens` tokens."""
        return self.config.tokens_kept(tokens)

    def forward(
        self,
        vision_features: torch.Tensor,
        question_embeddings: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        attention_scores: torch.Tensor | None = None,
        temperature: float | None = None,
        return_dict: bool | None = None,
        use_gumbel: bool | None = None,
    ) -> TokenMergerOutput | tuple:
        """Merges the tokens of a batch of images of one size.

        Args:
            vision_features: `(batch, n, feature_size)`.
            question_embeddings: `(batch, q, question_size)`, needed unless `merger_type` is `simple`.
            question_mask: `(batch, q)`, 1 on real tokens.
            attention_scores: `(batch, n)` attention that each token received in the vision tower, needed for
                `attention_guided="tower"`.
            temperature: scale of the Gumbel noise and of the straight-through factor in training, and of the assignment in
                the documented architecture; > 0. None: the module's `temperature`.
            return_dict: False for a tuple.
            use_gumbel: add Gumbel noise to the scores before the top-k. None: in training, where `gumbel_noise` is set.

        Raises:
            ValueError: the question or the attention is missing, or more tokens are wanted than `fixed_pooling` has queries.
        """
        temperature = self.temperature if temperature is None else temperature
        noise = self.training and self.config.gumbel_noise if use_gumbel is None else use_gumbel
        output = self._merge(vision_features, question_embeddings, question_mask, attention_scores, temperature, noise)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which the merger computes, which may be more precise than that of the features."""
        return (self.q_proj if self.config.architecture == "documented" else self.similarity_proj).weight.dtype

    def _merge(self, vision_features, question_embeddings, question_mask, attention_scores, temperature, noise):
        config = self.config
        documented = config.architecture == "documented"
        count = self.tokens_kept(vision_features.shape[1])
        tokens = features = vision_features.to(self.weight_dtype)
        if not documented:
            tokens = self.feature_proj(self.feature_norm(features))
        question, pooled = self._question(question_embeddings, question_mask)
        guide = self._guide(tokens, question, question_mask, attention_scores)
        if config.merger_type == "fixed_pooling":
            return self._pool(vision_features, tokens, pooled, count, guide)
        if config.merger_type == "question_aware":
            tokens = self.feature_proj(features) if documented else tokens
            attended = self.question_attention(tokens, question, question_mask)
            tokens = attended if documented else tokens + attended
        scores = self.scorer(tokens).squeeze(-1).float()
        if guide is not None:
            scores = scores + guide
        noisy = scores
        if noise:
            scale = 1.0 if documented else temperature
            noisy = scores - scale * torch.empty_like(scores).exponential_().log()
        ranked = noisy.argsort(-1, descending=True)
        index, order = ranked[:, :count].sort(-1)
        wanted = self._wanted(scores, pooled, count)
        gate, alive = self._gates(noisy, ranked, order, count, wanted, temperature)
        assignment = self._assignment(features, tokens, index, alive, temperature)
        weights = assignment * gate[:, None]
        if not documented:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        merged = weights.transpose(1, 2).to(vision_features.dtype) @ vision_features
        if not documented:
            # The division by column sums cancels the gate and part of its gradient; this factor restores that part.
            merged = merged * gate[..., None].to(vision_features.dtype)
        # `count` is a constant without gradient, so the documented loss takes the expected number instead.
        kept = scores.sigmoid().sum(-1) if wanted is None else wanted
        return TokenMergerOutput(
            merged_features=merged,
            merge_weights=weights,
            keep_index=index,
            keep_mask=alive,
            scores=scores,
            kept_tokens=kept,
            sparsity_loss=self._sparsity(kept, count, scores.shape[1]),
            entropy_loss=self._entropy(assignment, wanted),
        )

    def _assignment(self, features, tokens, index, alive, temperature: float) -> torch.Tensor:
        """How each token is shared among the centres, `(batch, n, m)`; rows sum to 1."""
        if self.config.architecture == "documented":
            logits = self._documented_similarity(features, index) / max(temperature, 1e-6)
        else:
            units = F.normalize(self.similarity_proj(tokens).float(), dim=-1)
            centres = units.gather(1, index[..., None].expand(-1, -1, units.shape[-1]))
            logits = self.log_scale.exp() * units @ centres.transpose(1, 2)
        return logits.masked_fill(~alive[:, None], float("-inf")).softmax(-1)

    def _sparsity(self, kept: torch.Tensor, count: int, tokens: int) -> torch.Tensor:
        if self.config.max_ratio is None:
            return (kept - count).square().mean()
        return (kept.mean() - self.config.tokens_wanted(tokens)).square()

    def _entropy(self, assignment: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        entropy = -(assignment * assignment.clamp(min=1e-9).log()).sum(-1).mean()
        if wanted is None or self.config.max_ratio is not None:
            return entropy
        return entropy + wanted.mean() / assignment.shape[1]

    def _documented_similarity(self, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """QKᵀ/√d, `(batch, n, m)`: queries are all tokens, keys the centres."""
        centres = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        queries, keys = self.q_proj(features).float(), self.k_proj(centres).float()
        return queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5

    def _question(self, embeddings, mask):
        if embeddings is None:
            if hasattr(self, "question_proj"):
                raise ValueError(
                    f"question_embeddings are needed for merger_type {self.config.merger_type!r}, attention_guided="
                    f"{self.config.attention_guided!r}, question_dependent_ratio={self.config.question_dependent_ratio!r}."
                )
            return None, None
        if not hasattr(self, "question_proj"):
            return None, None
        question = self.question_norm(self.question_proj(embeddings.to(self.weight_dtype)))
        mask = torch.ones(question.shape[:2], device=question.device) if mask is None else mask
        weight = mask[..., None].to(question.dtype)
        return question, (question * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _guide(self, tokens, question, question_mask, attention_scores) -> torch.Tensor | None:
        """The summand that `attention_guided` adds to the scores, `(batch, n)`."""
        if self.attention_weight is None:
            return None
        if self.question_guide is not None:
            attention_scores = self.question_guide(tokens, question, question_mask)
        elif attention_scores is None:
            raise ValueError("attention_guided=True needs attention_scores from the vision tower.")
        return self.attention_weight * attention_scores.float().add(1e-6).log()

    def _wanted(self, scores, pooled, count: int) -> torch.Tensor | None:
        """Number of tokens that each row keeps, `(batch,)`, differentiable; None where every row keeps `count`."""
        config, tokens = self.config, scores.shape[1]
        if self.confidence is not None:
            mass = torch.sigmoid(CONFIDENCE_SCALE * self.confidence.float())
            return within(confident_count(scores, mass), min(config.min_ratio * tokens, count), count)
        if self.ratio_head is None:
            return None
        low, high = config.min_ratio, config.max_ratio or config.merge_ratio
        share = low + (high - low) * torch.sigmoid(self.ratio_head(pooled).float()).squeeze(-1)
        return share * tokens

    def _gates(self, scores, ranked, order, count, wanted, temperature):
        """Per centre: a factor of value 1 that passes a gradient to the scores, and whether the row uses the slot."""
        chosen = scores.gather(-1, ranked[:, :count])
        following = ranked[:, count : count + 1] if count < scores.shape[1] else ranked[:, -1:]
        threshold = (chosen[:, -1:] + scores.gather(-1, following)).detach() / 2
        soft = torch.sigmoid((chosen - threshold) / max(temperature, 0.05))
        alive = torch.ones_like(soft, dtype=torch.bool)
        if wanted is not None:
            rank = torch.arange(count, device=scores.device)
            alive = rank < wanted.detach()[:, None].round().clamp(min=1)
        if self.ratio_head is not None:
            soft = soft * torch.sigmoid((wanted[:, None] - rank - 0.5) / max(temperature * count, 1.0))
        gate = torch.ones_like(soft) + soft - soft.detach()
        return gate.gather(-1, order), alive.gather(-1, order)

    def _pool(self, features, tokens, pooled, count, guide):
        if count > MAX_QUERIES:
            raise ValueError(
                f"fixed_pooling has {MAX_QUERIES} learned queries, one per merged token, and {count} are wanted; lower "
                "target_merge_tokens or merge_ratio."
            )
        queries = F.normalize((self.queries[:count] + pooled[:, None]).float(), dim=-1)
        units = F.normalize(self.similarity_proj(tokens).float(), dim=-1)
        logits = self.log_scale.exp() * units @ queries.transpose(1, 2)
        if guide is not None:
            logits = logits + guide[..., None]
        weights = logits.softmax(1)
        merged = weights.transpose(1, 2).to(features.dtype) @ features
        # A pooled token comes from no single place; evenly spread places keep rotary positions in range.
        index = ((torch.arange(count, device=features.device) + 0.5) * features.shape[1] / count).long()
        entropy = -(weights * weights.clamp(min=1e-9).log()).sum(1).mean()
        return TokenMergerOutput(
            merged_features=merged,
            merge_weights=weights,
            keep_index=index.expand(len(features), -1),
            keep_mask=torch.ones(len(features), count, dtype=torch.bool, device=features.device),
            scores=logits.amax(-1),
            kept_tokens=torch.full((len(features),), float(count), device=features.device),
            sparsity_loss=entropy.new_zeros(()),
            entropy_loss=entropy,
        )
