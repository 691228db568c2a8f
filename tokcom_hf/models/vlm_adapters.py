"""One small adapter per VLM family: where its parts are and how an image becomes tokens.

Everything else in `PrunedVLM` is the same for all families. An adapter gives
    text_model      embeddings, decoder layers, final norm, rotary embedding of the language model
    features        image inputs -> one `(tokens, feature_size)` tensor per image, before the projector where possible
    project         features -> language-model embeddings
    positions       rotary position ids, `(batch, length)` or `(3, batch, length)`
"""

import torch
from transformers import AutoModelForImageTextToText

from .eager_copy import eager_copy


class VLMAdapter:
    """Families whose image features are only available after projection (LLaVA-NeXT, Mistral 3, Qwen2-VL, ...)."""

    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    # Whether rotary positions have time, height and width.
    three_axes = False

    def __init__(self, base):
        self.base = base
        self.text_config = base.config.get_text_config()
        self.image_token_id = base.config.image_token_id
        missing = [n for n in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(self.text_model, n)]
        if missing:
            raise ValueError(
                f"The language model {type(self.text_model).__name__} has no {', '.join(missing)}; PrunedVLM supports "
                "Llama-like decoders (Llama, Mistral, Qwen2, Qwen3, Cohere2)."
            )
        kinds = getattr(self.text_config, "layer_types", None)
        other = set(kinds or ()) - {"full_attention", "sliding_attention"}
        if other:
            raise ValueError(
                f"PrunedVLM needs attention over all tokens in every layer, got layer types {sorted(other)}."
            )
        # Families without layer types slide in all layers where a window is set.
        slides = kinds is None or "sliding_attention" in kinds
        self.window = getattr(self.text_config, "sliding_window", None) if slides else None

    def check_window(self, length: int) -> None:
        """Raises ValueError where `length` positions do not fit into the language model's sliding window.

        Up to its width the window hides nothing. Beyond it, it would count removed tokens as if they were there.
        """
        if self.window is not None and length > self.window:
            raise ValueError(
                f"The language model's sliding window holds {self.window} tokens and prompt and answer take {length}: "
                "PrunedVLM works within the window only."
            )

    @property
    def text_model(self):
        """The language model: embeddings, decoder layers, final norm, rotary embedding."""
        return self.base.model.language_model

    @property
    def feature_size(self) -> int:
        """Width of what `features` returns."""
        return self.text_config.hidden_size

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens of an image, or None in families whose images have many sizes."""
        return None

    def features(self, inputs: dict, with_attention: bool = False) -> tuple[list, list | None]:
        """Per image `(tokens, feature_size)` and, where the tower gives it, received attention `(tokens,)`."""
        return list(self.base.model.get_image_features(**inputs).pooler_output), None

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """`(tokens, feature_size)` to `(tokens, hidden_size)`."""
        return features

    def positions(self, input_ids, attention_mask, inputs: dict) -> torch.Tensor:
        """Position ids `(batch, length)`; padding counts as position 0."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class LlavaAdapter(VLMAdapter):
    """LLaVA-1.5: a CLIP- or SigLIP-like tower, features before the two-layer projector."""

    image_inputs = ("pixel_values",)

    @property
    def feature_size(self) -> int:
        layers = self.base.config.vision_feature_layer
        width = self.base.config.vision_config.hidden_size
        return width if isinstance(layers, int) else width * len(layers)

    @property
    def tokens_per_image(self):
        config = self.base.config.vision_config
        if not isinstance(getattr(config, "image_size", None), int):
            return None
        first = any(name.endswith("class_embedding") for name, _ in self.base.model.vision_tower.named_parameters())
        dropped = self.base.config.vision_feature_select_strategy == "default"
        return (config.image_size // config.patch_size) ** 2 + first - dropped

    def features(self, inputs, with_attention=False):
        tower, config = self.base.model.vision_tower, self.base.config
        if with_attention:
            tower = eager_copy(tower)
        output = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=with_attention)
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        chosen = [output.hidden_states[layer] for layer in layers]
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        features = torch.cat([states[:, first:] for states in chosen], dim=-1)
        received = None
        if with_attention:
            # hidden_states[i] is what layer i - 1 put out, and has one entry more than attentions.
            index = layers[-1] if layers[-1] < 0 else layers[-1] - 1
            received = list(output.attentions[index].mean((1, 2))[:, first:])
        return list(features), received

    def project(self, features):
        return self.base.model.multi_modal_projector(features)


class InternVLAdapter(VLMAdapter):
    """InternVL as in transformers: features after the pixel shuffle, before the projector."""

    image_inputs = ("pixel_values",)

    @property
    def feature_size(self) -> int:
        return int(self.base.config.vision_config.hidden_size / self.base.config.downsample_ratio**2)

    @property
    def tokens_per_image(self):
        config, ratio = self.base.config.vision_config, self.base.config.downsample_ratio
        (height, width), (rows, columns) = config.image_size, config.patch_size
        return int(height // rows * ratio) * int(width // columns * ratio)

    def features(self, inputs, with_attention=False):
        model, config = self.base.model, self.base.config
        pixels = inputs["pixel_values"].to(dtype=model.dtype)
        output = model.vision_tower(pixel_values=pixels, output_hidden_states=config.vision_feature_layer != -1)
        layer = config.vision_feature_layer
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        side = int(states.shape[1] ** 0.5)
        states = states.reshape(states.shape[0], side, side, -1)
        states = model.pixel_shuffle(states, scale_factor=config.downsample_ratio)
        return list(states.reshape(states.shape[0], -1, states.shape[-1])), None

    def project(self, features):
        return self.base.model.multi_modal_projector(features)


class LlavaOnevisionAdapter(VLMAdapter):
    """LLaVA-OneVision: tiles of an image, or several images of one tile each."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")


class AyaVisionAdapter(VLMAdapter):
    """Aya Vision: every tile counts as an image."""

    image_inputs = ("pixel_values",)


class QwenVLAdapter(VLMAdapter):
    """Qwen2-VL and Qwen2.5-VL: any resolution, three-dimensional rotary positions."""

    image_inputs = ("pixel_values", "image_grid_thw")
    three_axes = True

    def positions(self, input_ids, attention_mask, inputs):
        kinds = (input_ids == self.image_token_id).int()
        positions, _ = self.base.model.get_rope_index(
            input_ids=input_ids,
            mm_token_type_ids=kinds,
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=attention_mask,
        )
        return positions


ADAPTERS: dict[str, type[VLMAdapter]] = {
    "llava": LlavaAdapter,
    "llava_next": VLMAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "mistral3": VLMAdapter,
    "aya_vision": AyaVisionAdapter,
    "internvl": InternVLAdapter,
    "qwen2_vl": QwenVLAdapter,
    "qwen2_5_vl": QwenVLAdapter,
}


def adapter_for(base) -> VLMAdapter:
    """The adapter of a VLM, by `config.model_type`.

    Raises:
        ValueError: a family without adapter, or a model without a language-model head.
    """
    check_family(base.config)
    wanted = AutoModelForImageTextToText._model_mapping[type(base.config)]
    if not isinstance(base, wanted):
        raise ValueError(
            f"PrunedVLM wraps a {wanted.__name__}, got {type(base).__name__}: load it with AutoModelForImageTextToText, "
            "and merge adapters of peft first."
        )
    return ADAPTERS[base.config.model_type](base)


def check_family(config) -> None:
    """Raises ValueError for a configuration whose family has no adapter."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind == "tokcom_pruned_vlm":
        raise ValueError("The base of a PrunedVLM must be a plain VLM, got a PrunedVLM ('tokcom_pruned_vlm').")
    if kind not in ADAPTERS:
        raise ValueError(f"PrunedVLM does not support {kind!r}; supported are {', '.join(sorted(ADAPTERS))}.")
