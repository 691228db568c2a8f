"""What `PrunedVLM` asks of a family of vision-language models: where its parts are and how an image becomes tokens."""

from dataclasses import dataclass, field

import torch


@dataclass
class ImageTokens:
    """Output of the vision tower for the images of a batch.

    Attributes:
        features: per image `(tokens, feature_size)`.
        received: per image the attention `(tokens,)` that its tokens received in the tower, or None.
        sequences: lengths, in patches, of the sequences within which the tower attends.
        windows: lengths, in patches, of the windows within which some layers of the tower attend; empty without windows.
        projected: number of tokens that passed the projector already; 0 if the features are those before it.
    """

    features: list[torch.Tensor]
    received: list[torch.Tensor] | None = None
    sequences: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    projected: int = 0


class VLMFamily:
    """A family whose image features are available after the projector only (LLaVA-NeXT, Mistral 3, Qwen2-VL, ...).

    Subclasses override what differs:
        text_model      the decoder: embeddings, layers, final norm, rotary embedding
        features        inputs of the images → one `(tokens, feature_size)` tensor per image
        project         features → embeddings of the language model
        positions       rotary position ids, `(batch, length)` or `(3, batch, length)`
    """

    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")
    # Whether rotary positions have three axes: time, height and width.
    three_axes = False
    # Whether tokens are reduced before the projector, which then processes fewer tokens.
    reduces_before_projector = False
    # Whether the tower gives the attention that each token receives.
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
        # Without `layer_types`, a window that is set holds for every layer.
        slides = kinds is None or "sliding_attention" in kinds
        self.window = getattr(self.text_config, "sliding_window", None) if slides else None

    def check_window(self, length: int) -> None:
        """Raises ValueError where `length` positions do not fit into the language model's sliding window.

        Up to its width, a window hides nothing. Beyond it, removed tokens would wrongly count towards the width.
        """
        if self.window is not None and length > self.window:
            raise ValueError(
                f"The language model's sliding window holds {self.window} tokens and prompt and answer take {length}: "
                "PrunedVLM works within the window only."
            )

    @property
    def text_model(self):
        """The decoder: embeddings, layers, final norm, rotary embedding."""
        return self.base.model.language_model

    @property
    def feature_size(self) -> int:
        """Width of what `features` returns."""
        return self.text_config.hidden_size

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens of every image, or None in families whose images have many sizes."""
        return None

    @property
    def tower(self):
        """The vision tower."""
        return self.base.model.vision_tower

    @property
    def projector(self):
        """The module that maps vision features to the language model's width."""
        return self.base.model.multi_modal_projector

    def features(self, inputs: dict, with_attention: bool = False) -> ImageTokens:
        """Tokens of the images.

        Args:
            inputs: the processor's tensors for the images, by the names in `image_inputs`.
            with_attention: also return the attention that each token received, where the family gives it.
        """
        output = self.base.model.get_image_features(**inputs)
        features = list(output.pooler_output)
        tiles, patches = output.last_hidden_state.shape[:2]
        first = self.base.config.vision_feature_select_strategy == "default"
        return ImageTokens(features, sequences=[patches] * tiles, projected=tiles * (patches - first))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(tokens, feature_size)` to embeddings `(tokens, hidden_size)`."""
        return features

    def positions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Position ids `(batch, length)`, 0 on padding before the first token."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
