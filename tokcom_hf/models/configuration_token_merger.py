"""Configuration of `TokenMerger`."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class TokenMergerConfig(PreTrainedConfig):
    """Stage 1: N vision tokens become M before the language model. The defaults are the documented numbers.

    What you will most likely change:
        feature_size: width of the vision features (1024 for LLaVA-1.5's CLIP tower).
        question_size: width of the language model's embeddings (4096 for LLaVA-1.5-7B).
        merge_ratio: share of tokens that stay; used where `target_merge_tokens` is None.
        target_merge_tokens: tokens that stay per image; an image that has fewer keeps them all.

    Kind:
        merger_type: `simple` scores tokens by themselves; `question_aware` lets them attend to the question first;
            `fixed_pooling` has one learned query per merged token, modulated by the question.
        question_dependent_ratio: the share kept is predicted from the question, between `min_ratio` and `merge_ratio`.
        attention_guided: adds the vision tower's received attention, with a learned weight, to the scores.

    Shape:
        internal_size, num_attention_heads: of the scorer and of the similarity space.
        max_tokens: learned queries that `fixed_pooling` holds.
        initial_scale: of the cosine similarities that spread tokens over centres.
        gumbel_noise: draw the centres at random, around the scores, while training.
    """

    model_type = "tokcom_token_merger"

    feature_size: int = 1024
    question_size: int = 4096
    merger_type: str = "question_aware"
    merge_ratio: float | int = 0.5
    target_merge_tokens: int | None = None
    question_dependent_ratio: bool = False
    min_ratio: float | int = 0.1
    attention_guided: bool = False
    internal_size: int = 512
    num_attention_heads: int = 4
    max_tokens: int = 576
    initial_scale: float | int = 20.0
    gumbel_noise: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.merger_type not in ("simple", "question_aware", "fixed_pooling"):
            raise ValueError(f"merger_type must be simple, question_aware or fixed_pooling, got {self.merger_type!r}.")
        if not 0.0 < self.min_ratio <= self.merge_ratio <= 1.0:
            raise ValueError(
                f"Need 0 < min_ratio <= merge_ratio <= 1, got min_ratio={self.min_ratio}, "
                f"merge_ratio={self.merge_ratio}."
            )
        if self.target_merge_tokens is not None and self.target_merge_tokens < 1:
            raise ValueError(f"target_merge_tokens must be at least 1, got {self.target_merge_tokens}.")
        if self.internal_size % self.num_attention_heads:
            raise ValueError(
                f"internal_size {self.internal_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)

    def tokens_kept(self, tokens: int) -> int:
        """Tokens left, at most, of an image of `tokens` tokens: at least 1, at most all of them."""
        if self.target_merge_tokens is None:
            return max(1, round(self.merge_ratio * tokens))
        return min(self.target_merge_tokens, tokens)
