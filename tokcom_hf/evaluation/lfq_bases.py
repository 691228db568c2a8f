"""Access to the parts of a vision-language model for joint LFQ training: transformers models and InternVL's remote code."""

from typing import Any

import torch
from torch import nn

from ..models.lfq_generation import LFQModeLogitsProcessor
from ..models.lfq_rows import text_host, vocabulary_of
from ..models.shared_cross_entropy import split_cross_entropy


def image_token_of(base) -> int | None:
    """Returns the id of the image placeholder token in prompts; None for a model without images.

    InternVL's remote code has it in `img_context_token_id`, which the user sets after loading.
    """
    for owner, name in ((base.config, "image_token_id"), (base, "img_context_token_id")):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name)
    return None


def sees_images(base) -> bool:
    """Returns whether a model can turn images into features for its language model."""
    return hasattr(base, "get_image_features") or hasattr(base, "extract_feature")


def image_tokens_of(base) -> int | None:
    """Returns the number of features per image tile, or None if the model does not state it."""
    return getattr(base.config, "image_seq_length", None) or getattr(base, "num_image_token", None)


def projector_of(base) -> nn.Module | None:
    """Returns the module that projects vision features to the language model's hidden size, or None."""
    for owner, name in ((getattr(base, "model", None), "multi_modal_projector"), (base, "mlp1")):
        if isinstance(getattr(owner, name, None), nn.Module):
            return getattr(owner, name)
    return None


def width_of_input(base, quantizer_input: str) -> int:
    """Returns the size of the features that a quantizer reads.

    Args:
        base: vision-language model.
        quantizer_input: `projected` for features after the projector, `vision` for features before it.

    Raises:
        ValueError: the model has no known projector.
    """
    if quantizer_input == "projected":
        return vocabulary_of(base)[0].weight.shape[1]
    projector = projector_of(base)
    if projector is None:
        raise ValueError(
            f"{type(base).__name__} has neither `multi_modal_projector` nor `mlp1`; set quantizer_input to projected."
        )
    # The projector's first layer is a norm or a linear layer, whose weight's last dimension is the vision size.
    return next(projector.parameters()).shape[-1]


def image_features_of(base: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes images `(batch, channels, height, width)`; returns their features after and before the projector.

    Returns:
        `(batch, n, hidden_size)`, the language model's input, and `(batch, n, vision size)`, or None without a projector.

    Raises:
        ValueError: the images have different numbers of features.
    """
    caught: list[torch.Tensor] = []
    projector = projector_of(base)
    handle: Any = projector and projector.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        if hasattr(base, "get_image_features"):
            features = base.get_image_features(pixel_values=pixel_values)
            features = getattr(features, "pooler_output", features)
        else:
            features = base.extract_feature(pixel_values)
    finally:
        if handle is not None:
            handle.remove()
    if not isinstance(features, torch.Tensor) or features.ndim != 3:
        raise ValueError(
            "Joint training needs the same number of tokens for every image, such as one tile of InternVL."
        )
    return features, caught[0].reshape(*features.shape[:2], -1) if caught else None


def last_hidden_states(base, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> torch.Tensor:
    """Runs the language model without its head; returns the final hidden states `(batch, length, hidden_size)`."""
    host: Any = text_host(base)
    body = host.base_model
    return body(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **kwargs)[0]


@torch.no_grad()
def frozen_copy(base):
    """A frozen copy of a plain model, without the LFQ ids that were added to the original.

    The copy is built from the config and the weights, because a deep copy would also copy the hooks of `LFQExpandedModel`
    and, through them, the whole wrapper.
    """
    copy = type(base)._from_config(base.config, dtype=base.dtype)
    copy.load_state_dict(base.state_dict())
    copy.generation_config = base.generation_config
    return copy.requires_grad_(False).eval()


def next_id_loss(model, input_ids, attention_mask, labels) -> torch.Tensor:
    """Next-token cross-entropy of an `LFQExpandedModel` over original and LFQ ids, for texts without an image."""
    host: Any = text_host(model.base)
    if host is model.base:
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    # The forward of remote code requires an image, so its language model is called directly.
    hidden = last_hidden_states(model.base, host.get_input_embeddings()(input_ids), attention_mask)
    head = vocabulary_of(model.base)[1]
    tables = [(head.weight, getattr(head, "bias", None)), model.lfq_rows.tables()]
    return split_cross_entropy(hidden[:, :-1].flatten(0, 1), tables, labels[:, 1:].reshape(-1))


def generate_text(model: Any, inputs_embeds: torch.Tensor, **options) -> torch.Tensor:
    """Generates text ids after prompt embeddings `(batch, length, hidden_size)`, never LFQ ids; `model` may be plain."""
    base = getattr(model, "base", model)
    host: Any = text_host(base)
    if base is not model and host is base:
        return model.generate(inputs_embeds=inputs_embeds, mode="text", **options)
    if base is not model:
        start, end = model.lfq_token_range
        text = model.config.text_vocab_size or start
        options["logits_processor"] = [LFQModeLogitsProcessor("text", (start, end), text, 1)]
    return host.generate(inputs_embeds=inputs_embeds, **options)
