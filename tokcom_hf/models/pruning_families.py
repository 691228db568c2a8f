"""The families of vision-language models that `PrunedVLM` supports; its other code is the same for all families."""

from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from .pruning_eager_copy import eager_copy
from .pruning_family_base import ImageTokens, VLMFamily


class LlavaFamily(VLMFamily):
    """LLaVA-1.5: a CLIP- or SigLIP-like tower; the features are those before the two-layer projector."""

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
            # hidden_states[i] is the output of layer i - 1; `attentions` has one entry fewer.
            index = layers[-1] if layers[-1] < 0 else layers[-1] - 1
            received = list(output.attentions[index].mean((1, 2))[:, first:])
        return ImageTokens(list(features), received, [output.last_hidden_state.shape[1]] * len(features))

    def project(self, features):
        return self.base.model.multi_modal_projector(features)


class InternVLFamily(VLMFamily):
    """InternVL as in transformers; the features are those after the pixel shuffle and before the projector."""

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


class LlavaOnevisionFamily(VLMFamily):
    """LLaVA-OneVision: tiles of an image, or several images of one tile each."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")


class Mistral3Family(VLMFamily):
    """Mistral 3: images of any size, whose patches attend to each other within the image."""

    def features(self, inputs, with_attention=False):
        tokens = list(self.base.model.get_image_features(**inputs).pooler_output)
        sizes = torch.as_tensor(inputs["image_sizes"]) // self.tower.patch_size
        return ImageTokens(tokens, sequences=sizes.prod(-1).tolist(), projected=sum(map(len, tokens)))


class AyaVisionFamily(VLMFamily):
    """Aya Vision: every tile counts as an image."""

    image_inputs = ("pixel_values",)

    def features(self, inputs, with_attention=False):
        tokens = super().features(inputs, with_attention)
        # The projector merges neighbouring patches before its linear layers.
        tokens.projected = sum(map(len, tokens.features))
        return tokens


class QwenVLFamily(VLMFamily):
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


FAMILIES: dict[str, type[VLMFamily]] = {
    "llava": LlavaFamily,
    "llava_next": VLMFamily,
    "llava_onevision": LlavaOnevisionFamily,
    "mistral3": Mistral3Family,
    "aya_vision": AyaVisionFamily,
    "internvl": InternVLFamily,
    "qwen2_vl": QwenVLFamily,
    "qwen2_5_vl": QwenVLFamily,
}


def family_of(base) -> VLMFamily:
    """The family of a VLM, by its `config.model_type`.

    Raises:
        TypeError: `base` is no model of transformers.
        ValueError: the family is not supported, or the model has no language-model head.
    """
    if not hasattr(base, "config"):
        raise TypeError(f"PrunedVLM wraps a model of transformers, its Hub name or folder, got {type(base).__name__}.")
    check_family(base.config)
    wanted: Any = AutoModelForImageTextToText._model_mapping[type(base.config)]
    if not isinstance(base, wanted):
        raise ValueError(
            f"PrunedVLM wraps a {wanted.__name__}, got {type(base).__name__}: load it with AutoModelForImageTextToText, "
            "and merge adapters of peft first."
        )
    return FAMILIES[base.config.model_type](base)


def check_family(config) -> None:
    """Raises ValueError for a configuration whose family is not supported."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind == "tokcom_pruned_vlm":
        raise ValueError("The base of a PrunedVLM must be a plain VLM, got a PrunedVLM ('tokcom_pruned_vlm').")
    if kind not in FAMILIES:
        raise ValueError(f"PrunedVLM does not support {kind!r}; supported are {', '.join(sorted(FAMILIES))}.")
