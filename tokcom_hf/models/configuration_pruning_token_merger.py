"""Configuration of `TokenMerger`."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pruning_shapes import check_architecture, check_heads
from .shared_removed_fields import take_removed

# Removed fields and their former defaults.
REMOVED = {"max_tokens": 576}


@strict
class TokenMergerConfig(PreTrainedConfig):
    """Stage 1: N vision tokens become M before the language model. The defaults are the documented numbers.

    What you will most likely change:
        feature_size: width of the vision features (1024 for LLaVA-1.5's CLIP tower).
        question_size: width of the language model's embeddings (4096 for LLaVA-1.5-7B).
        merge_ratio: share of an image's tokens that stay, in (0, 1]; read where `target_merge_tokens` is None.
        target_merge_tokens: number of tokens that stay per image; a smaller image keeps all of its tokens.

    Kind:
        merger_type: `simple` scores each token alone; `question_aware` lets the tokens attend to the question before they
            are scored; `fixed_pooling` has one learned query per merged token, shifted by the question.
        question_dependent_ratio: False (default): all rows keep the same number of tokens. `learned` (or True): a linear
            layer predicts each row's share from the question. `confidence`: a row keeps the best tokens that hold a learned
            mass of softmax(scores), so that peaked scores keep few.
        min_ratio, max_ratio: bounds of the share with `question_dependent_ratio`. With `max_ratio` training holds the mean
            over a batch at `merge_ratio` (or `target_merge_tokens`); without it `merge_ratio` is the upper bound.
        attention_guided: add log(attention), times a learned weight, to the scores; False (default) adds nothing.
            `question`: the attention of the question's tokens to each vision token, for every VLM. `tower` (or True): the
            attention that each token receives in the vision tower, for VLMs whose tower gives it (LLaVA).

    Computation:
        architecture: `normalized` assigns by cosine similarity at a learned scale, independent of the temperature, and
            divides weights by their column sums, which keeps the norms of features. `documented` assigns by
            softmax(QKᵀ/√d / temperature) of two projections of the features, merges by weightsᵀ · features, and has Gumbel
            noise of scale 1 and no normalisation.

    Shape:
        internal_size, num_attention_heads: width and heads of the scorer and of the projections.
        scorer_size: hidden width of the scorer; `internal_size` where None.
        initial_scale: initial scale of the cosine similarities; a larger one assigns each token to fewer centres.
        gumbel_noise: in training the centres are a sample (Gumbel-top-k of the scores) instead of the top-k.
        initializer_range: standard deviation of initial linear weights.
    """

    model_type = "tokcom_token_merger"

    feature_size: int = 1024
    question_size: int = 4096
    merger_type: str = "question_aware"
    merge_ratio: float | int = 0.5
    target_merge_tokens: int | None = None
    question_dependent_ratio: bool | str = False
    min_ratio: float | int = 0.1
    max_ratio: float | int | None = None
    attention_guided: bool | str = False
    architecture: str = "normalized"
    internal_size: int = 512
    scorer_size: int | None = None
    num_attention_heads: int = 4
    initial_scale: float | int = 20.0
    gumbel_noise: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        take_removed(kwargs, REMOVED)
        if self.merger_type not in ("simple", "question_aware", "fixed_pooling"):
            raise ValueError(f"merger_type must be simple, question_aware or fixed_pooling, got {self.merger_type!r}.")
        check_architecture(self.architecture)
        if self.architecture == "documented" and self.merger_type == "fixed_pooling":
            raise ValueError(
                "architecture 'documented' scores tokens: merger_type simple or question_aware; fixed_pooling is normalized."
            )
        if self.attention_guided not in (False, True, "tower", "question"):
            raise ValueError(f"attention_guided must be false, tower or question, got {self.attention_guided!r}.")
        if self.question_dependent_ratio not in (False, True, "learned", "confidence"):
            raise ValueError(
                f"question_dependent_ratio must be false, learned or confidence, got {self.question_dependent_ratio!r}."
            )
        if not 0.0 < self.min_ratio <= self.merge_ratio <= (1.0 if self.max_ratio is None else self.max_ratio) <= 1.0:
            raise ValueError(
                f"Need 0 < min_ratio <= merge_ratio <= max_ratio <= 1, got min_ratio={self.min_ratio}, "
                f"merge_ratio={self.merge_ratio}, max_ratio={self.max_ratio}."
            )
        if self.question_dependent_ratio and self.merger_type == "fixed_pooling":
            raise ValueError(
                "question_dependent_ratio ranks tokens: it needs merger_type simple or question_aware, got fixed_pooling."
            )
        if self.max_ratio is not None and not self.question_dependent_ratio:
            raise ValueError(
                f"max_ratio={self.max_ratio} bounds a share that depends on the question; set question_dependent_ratio to "
                "learned or confidence, or leave max_ratio out."
            )
        if self.max_ratio is None and self.question_dependent_ratio == "confidence":
            raise ValueError(
                "question_dependent_ratio 'confidence' needs max_ratio, the largest share of tokens a row may keep; "
                "merge_ratio is the mean."
            )
        if self.target_merge_tokens is not None and self.target_merge_tokens < 1:
            raise ValueError(f"target_merge_tokens must be at least 1, got {self.target_merge_tokens}.")
        check_heads(self.internal_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    def tokens_kept(self, tokens: int) -> int:
        """The most tokens that are left of an image of `tokens` tokens; from 1 to `tokens`."""
        if self.max_ratio is None:
            return self.tokens_wanted(tokens)
        # 1e-6: a product such as 0.55 · 100 = 55.00000000000001 must not add a slot.
        return max(1, math.ceil(self.max_ratio * tokens - 1e-6))

    def tokens_wanted(self, tokens: int) -> int:
        """The budget for an image of `tokens` tokens. Where rows keep different numbers, the mean over a batch meets it."""
        target = self.target_merge_tokens
        wanted = max(1, round(self.merge_ratio * tokens)) if target is None else min(target, tokens)
        return wanted if self.max_ratio is None else min(wanted, self.tokens_kept(tokens))
