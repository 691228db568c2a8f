"""What `JointLFQTrainer` trains: a language model with LFQ tokens and a quantizer, as one module with one forward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..evaluation.lfq_bases import (
    image_features_of,
    image_token_of,
    last_hidden_states,
    next_id_loss,
    sees_images,
    width_of_input,
)
from ..metrics.lfq import code_indices
from ..models.lfq_rows import text_host, vocabulary_of
from ..models.modeling_lfq_expanded import LFQExpandedModel
from ..models.modeling_lfq_quantizer import LFQQuantizer, LFQQuantizerOutput
from ..models.vqgan_code_search import all_reduce, world_size
from .lfq_normalizer import summed_log_normalizer

QUANTIZER_INPUTS = ("projected", "vision")


@dataclass
class JointLFQOutput(ModelOutput):
    """Losses of one batch.

    Attributes:
        generation_loss: cross-entropy in nats of the image's LFQ ids after its caption, over old and new ids; None for a
            model without LFQ ids.
        quantized_kl, continuous_kl: KL(teacher ‖ student) in nats per answer token, over old and new ids; the teacher
            gives new ids no probability.
        lfq_mass, continuous_lfq_mass: `(answer tokens,)`, the student's total probability of LFQ ids at positions that
            predict an answer token, from quantized and from continuous features.
        quantized_logits: `(answer tokens, old vocabulary)`.
        quantizer: the quantizer's output.
    """

    generation_loss: torch.Tensor | None = None
    quantized_kl: torch.Tensor | None = None
    continuous_kl: torch.Tensor | None = None
    lfq_mass: torch.Tensor | None = None
    continuous_lfq_mass: torch.Tensor | None = None
    quantized_logits: torch.Tensor | None = None
    quantizer: LFQQuantizerOutput | None = None


class JointLFQModel(nn.Module):
    """A vision-language model with LFQ tokens, and the quantizer whose codes these tokens represent.

    Args:
        language_model: an `LFQExpandedModel` around a vision-language model; or a plain vision-language model, which learns
            to read quantized features and cannot generate images.
        quantizer: maps the model's image features to embeddings of the model's width.
        quantizer_input: `projected`, the features that the language model reads; or `vision`, those of the vision tower
            before the projector (of width 4,096 in InternVL).

    Raises:
        ValueError: the base sees no images, or widths and numbers of bits do not fit.
    """

    def __init__(
        self,
        language_model: LFQExpandedModel | PreTrainedModel,
        quantizer: LFQQuantizer,
        quantizer_input: str = "projected",
    ):
        super().__init__()
        if quantizer_input not in QUANTIZER_INPUTS:
            raise ValueError(f"quantizer_input must be one of {', '.join(QUANTIZER_INPUTS)}, got {quantizer_input!r}.")
        self.quantizer_input = quantizer_input
        self.language_model, self.quantizer = language_model, quantizer
        if not sees_images(self.base):
            raise ValueError(
                f"{type(self.base).__name__} sees no images; joint training needs a vision-language model such as "
                "InternVLForConditionalGeneration."
            )
        width = vocabulary_of(self.base)[0].weight.shape[1]
        seen = width_of_input(self.base, quantizer_input)
        wanted = (quantizer.config.input_size, quantizer.config.llm_hidden_size)
        if wanted != (seen, width):
            raise ValueError(
                f"The quantizer maps width {wanted[0]} to width {wanted[1]}, but {quantizer_input} image features of this "
                f"model have width {seen} and its embeddings width {width}; set input_size and llm_hidden_size to these."
            )
        new = len(self.language_model.lfq_rows.embedding) if self.draws else None
        if new not in (None, quantizer.config.codebook_size):
            raise ValueError(
                f"The language model has {new:,} LFQ ids and the quantizer {quantizer.config.codebook_size:,} codes; "
                "give both the same output_dim."
            )

    # ---------------------------------------------------------------- parts
    @property
    def _no_split_modules(self) -> list[str]:
        # accelerate shards the model by these layers.
        parts = (self.base, self.quantizer)
        return sorted({name for part in parts for name in part._no_split_modules or ()})

    @property
    def draws(self) -> bool:
        """Whether the vocabulary has LFQ ids, so that the model can generate images."""
        return isinstance(self.language_model, LFQExpandedModel)

    @property
    def base(self):
        """The plain vision-language model inside."""
        return self.language_model.base if self.draws else self.language_model

    @property
    def old_rows_train(self) -> bool:
        """Whether the old embedding table and head train, which is the case if `freeze_original` is off."""
        return self.draws and not self.language_model.config.freeze_original

    def tables(self) -> list[nn.Parameter]:
        """The parameters of the old embedding table and head; one parameter if they are tied."""
        found = [parameter for module in vocabulary_of(self.base) for parameter in module.parameters()]
        return list(dict.fromkeys(found))

    def new_rows(self) -> list[nn.Parameter]:
        """Parameters of the new ids."""
        return list(self.language_model.lfq_rows.parameters()) if self.draws else []

    def llm_parameters(self) -> list[nn.Parameter]:
        """Parameters of the language model's layers, without its tables."""
        tables = {id(parameter) for parameter in self.tables()}
        return [p for p in text_host(self.base).get_decoder().parameters() if id(p) not in tables]

    def set_trainable(self, tune_llm: bool) -> None:
        """Lets quantizer and new rows train, the language model's layers if `tune_llm`, and old rows unless frozen.

        Parts that train become float32, and the whole base if any of it trains: in bfloat16 most small updates round to
        nothing. With `bf16=True` in the training arguments the computation still runs in bfloat16.
        """
        self.requires_grad_(False)
        self.quantizer.float().requires_grad_(True)
        if self.draws:
            self.language_model.lfq_rows.float()
        if tune_llm or self.old_rows_train:
            self.base.float()
        for parameter in self.new_rows():
            parameter.requires_grad_(True)
        for parameter in self.llm_parameters():
            parameter.requires_grad_(tune_llm)
        if self.old_rows_train:
            self.language_model.freeze_original_rows(False)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As in `PreTrainedModel`, for base and quantizer; `Trainer` calls it for `gradient_checkpointing`."""
        for part in (self.base, self.quantizer):
            part.gradient_checkpointing_enable(*args, **kwargs)

    # ---------------------------------------------------------------- pieces of a step
    @torch.no_grad()
    def see(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(batch, channels, height, width)` → features for the language model and features for the quantizer."""
        projected, vision = image_features_of(self.base, pixel_values.to(self.base.dtype))
        if self.quantizer_input == "projected":
            return projected, projected
        assert vision is not None
        return projected, vision

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)` → features `(batch, n, hidden)` that the language model reads."""
        return self.see(pixel_values)[0]

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, length, hidden)` of text ids, with `features` at the positions of the image token."""
        image_token = image_token_of(self.base)
        if image_token is None:
            raise ValueError(
                f"{type(self.base).__name__} names no image token; set its config.image_token_id, or img_context_token_id "
                "of InternVL's remote code."
            )
        embeddings = vocabulary_of(self.base)[0](input_ids)
        places = input_ids == image_token
        if int(places.sum()) != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"The texts hold {int(places.sum())} image tokens for {features.shape[0] * features.shape[1]} image "
                "features; each row needs one image."
            )
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    def answer_states(self, features, input_ids, attention_mask, labels, position_ids=None) -> torch.Tensor:
        """The head's input `(answer tokens, hidden)` at the positions that predict a label."""
        where = {} if position_ids is None else {"position_ids": position_ids}
        hidden = last_hidden_states(self.base, self.embed(input_ids, features), attention_mask, **where)
        return hidden[:, :-1][labels[:, 1:] != -100]

    def answer_logits(self, features, **text) -> torch.Tensor:
        """Logits `(answer tokens, old vocabulary)` at the positions that predict a label; `text` as for `answer_states`."""
        return self.original_logits(self.answer_states(features, **text))

    def original_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `(…, old vocabulary)` of the head's input."""
        head = vocabulary_of(self.base)[1]
        return nn.functional.linear(states, head.weight, getattr(head, "bias", None))

    def codes_to_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Bits `(batch, n, output_dim)` → LFQ ids `(batch, n)`."""
        expanded: Any = self.language_model
        return expanded.lfq_token_range[0] + code_indices(codes)

    def generation_loss(self, codes, caption_ids, caption_mask) -> torch.Tensor:
        """Next-token cross-entropy, in nats per image token, of the image's ids after its caption."""
        ids = self.codes_to_ids(codes)
        labels = torch.cat([torch.full_like(caption_ids, -100), ids], dim=1)
        mask = torch.cat([caption_mask, torch.ones_like(ids)], dim=1)
        return next_id_loss(self.language_model, torch.cat([caption_ids, ids], dim=1), mask, labels)

    def compare(self, teacher_logits: torch.Tensor, states: torch.Tensor):
        """Compares the student's `states` `(answer tokens, hidden)` with the teacher's logits over old ids.

        Returns:
            KL(teacher ‖ student) over all ids, the student's logits of old ids, and its probability of LFQ ids per token.
        """
        logits = self.original_logits(states)
        old = logits.float().logsumexp(-1)
        if not self.draws:
            whole = old.detach()
            return self.kl(teacher_logits, logits.float() - whole[:, None], old.sum()), logits, torch.zeros_like(whole)
        total, whole, mass = summed_log_normalizer(states, old, *self.language_model.lfq_rows.tables())
        return self.kl(teacher_logits, logits.float() - whole[:, None], total), logits, mass

    def kl(self, teacher_logits: torch.Tensor, student: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """KL(teacher ‖ student) in nats per answer token of the global batch.

        Args:
            teacher_logits: `(answer tokens, old vocabulary)`; the teacher gives new ids no probability.
            student: log-probabilities of old ids, normalised over old and new ids; the log-normaliser has no gradient here.
            total: sum of the log-normalisers of all rows, which carries their gradient.
        """
        teacher = teacher_logits.float().log_softmax(-1)
        count = torch.tensor(float(max(1, len(teacher))), device=teacher.device)
        if self.training:
            # DDP averages over ranks, which hold different numbers of answer tokens.
            count = all_reduce(count) / world_size()
        # The teacher's probabilities sum to 1, so that each row's normaliser enters once.
        return ((teacher.exp() * (teacher - student)).sum() + (total - total.detach())) / count

    def forward(
        self,
        image_features: torch.Tensor,
        teacher_logits: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        caption_ids: torch.Tensor,
        caption_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        quantizer_features: torch.Tensor | None = None,
    ) -> JointLFQOutput:
        """All losses of a batch.

        Args:
            image_features: `(batch, n, hidden)` of `image_features`.
            teacher_logits: `(answer tokens, old vocabulary)`.
            input_ids, attention_mask, labels: `(batch, length)` questions and answers about each image.
            caption_ids, caption_mask: `(batch, caption length)`, ending with the start-of-image token.
            position_ids: positions of packed questions, whose `attention_mask` is `(batch, 1, length, length)`.
            quantizer_features: `(batch, n, input_size)`, the quantizer's input; None takes `image_features`, which are its
                target in either case.
        """
        read = image_features if quantizer_features is None else quantizer_features
        quantized = self.quantizer(read, targets=image_features)
        text = (input_ids, attention_mask, labels, position_ids)
        quantized_kl, logits, mass = self.compare(teacher_logits, self.answer_states(quantized.embeddings, *text))
        continuous_kl, _, continuous_mass = self.compare(teacher_logits, self.answer_states(image_features, *text))
        return JointLFQOutput(
            generation_loss=self.generation_loss(quantized.codes, caption_ids, caption_mask) if self.draws else None,
            quantized_kl=quantized_kl,
            continuous_kl=continuous_kl,
            lfq_mass=mass,
            continuous_lfq_mass=continuous_mass,
            quantized_logits=logits,
            quantizer=quantized,
        )
