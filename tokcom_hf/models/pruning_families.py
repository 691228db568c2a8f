"""One small adapter per VLM family: where its parts are and how an image becomes tokens.

Everything else in `PrunedVLM` is the same for all families. An adapter gives
    text_model      embeddings, decoder layers, final norm, rotary embedding of the language model
    features        image inputs -> one `(tokens, feature_size)` tensor per image, before the projector where possible
    project         features -> language-model embeddings
    positions       rotary position ids, `(batch, length)` or `(3, batch, length)`
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForImageTextToText

from .pruning_eager_copy import eager_copy


@dataclass
class ImageTokens:
    """What the vision tower made of a batch's images.

    Attributes:
        features: per image `(tokens, feature_size)`.
        received: per image the attention `(tokens,)` that its tokens received in the tower, or None.
        sequences: numbers of patches that attend to each other in the tower.
        windows: the same for the tower's layers with window attention, if it has any.
        projected: tokens that have been through the projector; 0 where the features come from before it.
    """

    features: list[torch.Tensor]
    received: list[torch.Tensor] | None = None
    sequences: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    projected: int = 0


class VLMAdapter:
    """Families whose image features are only available after projection (LLaVA-NeXT, Mistral 3, Qwen2-VL, ...)."""

    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    # Whether rotary positions have time, height and width.
    three_axes = False
    # Whether features are reduced before the projector, so that it works on fewer.
    reduces_before_projector = False
    # Whether the tower tells the attention that each token receives.
    gives_attention = False

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

    @property
    def tower(self):
        """The vision tower."""
        return self.base.model.vision_tower

    @property
    def projector(self):
        """What maps vision features to the language model's width."""
        return self.base.model.multi_modal_projector

    def features(self, inputs: dict, with_attention: bool = False) -> ImageTokens:
        """The images' tokens, with received attention where it is asked for and the family gives it."""
        output = self.base.model.get_image_features(**inputs)
        features = list(output.pooler_output)
        tiles, patches = output.last_hidden_state.shape[:2]
        first = self.base.config.vision_feature_select_strategy == "default"
        return ImageTokens(features, sequences=[patches] * tiles, projected=tiles * (patches - first))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """`(tokens, feature_size)` to `(tokens, hidden_size)`."""
        return features

    def positions(self, input_ids, attention_mask, inputs: dict) -> torch.Tensor:
        """Position ids `(batch, length)`; padding counts as position 0."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class LlavaAdapter(VLMAdapter):
    """LLaVA-1.5: a CLIP- or SigLIP-like tower, features before the two-layer projector."""

    image_inputs = ("pixel_values",)
    reduces_before_projector = True
    gives_attention = True

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
        return ImageTokens(list(features), received, [output.last_hidden_state.shape[1]] * len(features))

    def project(self, features):
        return self.base.model.multi_modal_projector(features)


class InternVLAdapter(VLMAdapter):
    """InternVL as in transformers: features after the pixel shuffle, before the projector."""

    image_inputs = ("pixel_values",)
    reduces_before_projector = True

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
        patches = states.shape[1]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        side = int(states.shape[1] ** 0.5)
        states = states.reshape(states.shape[0], side, side, -1)
        states = model.pixel_shuffle(states, scale_factor=config.downsample_ratio)
        features = list(states.reshape(states.shape[0], -1, states.shape[-1]))
        return ImageTokens(features, sequences=[patches] * len(features))

    def project(self, features):
        return self.base.model.multi_modal_projector(features)


class LlavaOnevisionAdapter(VLMAdapter):
    """LLaVA-OneVision: tiles of an image, or several images of one tile each."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")


class Mistral3Adapter(VLMAdapter):
    """Mistral 3: images of any size, whose patches attend to each other within the image."""

    def features(self, inputs, with_attention=False):
        tokens = list(self.base.model.get_image_features(**inputs).pooler_output)
        sizes = torch.as_tensor(inputs["image_sizes"]) // self.tower.patch_size
        return ImageTokens(tokens, sequences=sizes.prod(-1).tolist(), projected=sum(map(len, tokens)))


class AyaVisionAdapter(VLMAdapter):
    """Aya Vision: every tile counts as an image."""

    image_inputs = ("pixel_values",)

    def features(self, inputs, with_attention=False):
        tokens = super().features(inputs, with_attention)
        # The projector puts neighbouring patches together before its matrices.
        tokens.projected = sum(map(len, tokens.features))
        return tokens


class QwenVLAdapter(VLMAdapter):
    """Qwen2-VL and Qwen2.5-VL: any resolution, three-dimensional rotary positions."""

    image_inputs = ("pixel_values", "image_grid_thw")
    three_axes = True

    @property
    def tower(self):
        return self.base.model.visual

    @property
    def projector(self):
        return self.base.model.visual.merger

    def features(self, inputs, with_attention=False):
        tokens = list(self.base.model.get_image_features(**inputs).pooler_output)
        config = self.base.config.vision_config
        side = getattr(config, "window_size", 0) // config.patch_size
        sequences, windows = [], []
        for frames, height, width in inputs["image_grid_thw"].tolist():
            sequences += [height * width] * frames
            if side:
                windows += [h * w for h in _pieces(height, side) for w in _pieces(width, side)] * frames
        return ImageTokens(tokens, None, sequences, windows, sum(map(len, tokens)))

    def positions(self, input_ids, attention_mask, inputs):
        kinds = (input_ids == self.image_token_id).int()
        positions, _ = self.base.model.get_rope_index(
            input_ids=input_ids,
            mm_token_type_ids=kinds,
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=attention_mask,
        )
        return positions


def _pieces(length: int, size: int) -> list[int]:
    """`length` cut into pieces of `size`, the last of which may be smaller."""
    return [min(size, length - start) for start in range(0, length, size)]


ADAPTERS: dict[str, type[VLMAdapter]] = {
    "llava": LlavaAdapter,
    "llava_next": VLMAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "mistral3": Mistral3Adapter,
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
    if not hasattr(base, "config"):
        raise TypeError(f"PrunedVLM wraps a model of transformers, its Hub name or folder, got {type(base).__name__}.")
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
