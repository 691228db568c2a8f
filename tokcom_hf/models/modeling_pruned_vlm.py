"""`PrunedVLM`: any supported vision-language model with fewer vision tokens.

Stage 1 works before the language model: a `TokenMerger` or a training-free strategy turns an image's tokens into fewer.
Stage 2 works inside it: before chosen layers a `LayerPruner` (or FastV) decides which vision tokens go on. In `hard`
mode the others are removed from hidden states, masks and KV cache; positions of what stays do not change.
"""

import torch
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel

from .cache_name import CACHE, one_cache
from .configuration_layer_pruner import LayerPrunerConfig
from .configuration_pruned_vlm import MODES, PrunedVLMConfig
from .configuration_token_merger import TokenMergerConfig
from .modeling_layer_pruner import LayerPruner
from .modeling_token_merger import TokenMerger
from .pruned_decoder import decode, run_layers
from .pruned_vlm_files import load_pruned_vlm, save_pruned_vlm
from .pruned_vlm_output import PrunedVLMOutput
from .token_removal import PrunedCache
from .token_report import token_report
from .token_selection import LAYER_STRATEGIES, STRATEGIES
from .vision_reduction import VisionReduction
from .vlm_adapters import adapter_for


class PrunedVLM(VisionReduction, PreTrainedModel, GenerationMixin):
    """A VLM, its pruning stages and a mode."""

    config: PrunedVLMConfig
    config_class = PrunedVLMConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PrunedVLMConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        if base is None:
            base = AutoModelForImageTextToText.from_config(config.make_base_config())
        self.base = base
        self.adapter = adapter_for(base)
        self.token_merger = self.layer_pruner = None
        if config.token_merger is not None:
            self.token_merger = TokenMerger(TokenMergerConfig(**config.token_merger))
        if config.layer_pruner is not None:
            self.layer_pruner = LayerPruner(LayerPrunerConfig(**config.layer_pruner))
        self._check()
        self.generation_config = base.generation_config
        self._mode = config.pruning_mode
        self.temperature = 0.1
        self._report: dict | None = None
        self._generator = torch.Generator().manual_seed(config.strategy_seed)

    def _check(self) -> None:
        depth = len(self.adapter.text_model.layers)
        at = self.layer_pruner.config.layers if self.layer_pruner is not None else []
        if self.config.strategy in LAYER_STRATEGIES:
            at = [self.config.strategy_layer]
            if at[0] < 1:
                raise ValueError("fastv reads the attention of the layer before it: strategy_layer must be >= 1.")
        if any(not 0 <= layer < depth for layer in at):
            raise ValueError(
                f"Pruning layers {at} must lie in 0 … {depth - 1}: the language model has {depth} layers."
            )
        known = (*STRATEGIES, *LAYER_STRATEGIES)
        if self.config.strategy is not None and self.config.strategy not in known:
            raise ValueError(f"Unknown strategy {self.config.strategy!r}; known are {', '.join(known)}.")
        width, size = self.adapter.text_config.hidden_size, self.adapter.feature_size
        if self.layer_pruner is not None and self.layer_pruner.config.hidden_size != width:
            raise ValueError(
                f"layer_pruner.hidden_size must be the language model's {width}, got {self.layer_pruner.config.hidden_size}."
            )
        merger = self.token_merger.config if self.token_merger is not None else None
        self._check_budget(merger)
        if merger is not None and (merger.feature_size, merger.question_size) != (size, width):
            raise ValueError(
                f"token_merger needs feature_size={size} and question_size={width} for this VLM, got "
                f"{merger.feature_size} and {merger.question_size}."
            )

    def _check_budget(self, merger: TokenMergerConfig | None) -> None:
        """What stage 2 keeps must be there after stage 1; families with images of many sizes are checked as they come."""
        budget = self.layer_pruner.config.keep_tokens if self.layer_pruner is not None else None
        left = self.base.config.image_seq_length if self.base.config.model_type == "llava" else None
        if merger is not None:
            left = merger.target_merge_tokens or (left and merger.merge_ratio * left)
        if budget and left and max(budget) > left:
            raise ValueError(
                f"layer_pruner.keep_tokens={budget} wants more than the {left:g} vision tokens that reach the language "
                "model; lower it, or raise token_merger.target_merge_tokens or merge_ratio."
            )

    # ------------------------------------------------------------------ building, saving, loading
    @classmethod
    def from_base(
        cls,
        model,
        token_merger: TokenMerger | TokenMergerConfig | None = None,
        layer_pruner: LayerPruner | LayerPrunerConfig | None = None,
        strategy: str | None = None,
        keep: int | None = None,
        **options,
    ) -> "PrunedVLM":
        """Wraps a VLM.

        Args:
            model: a loaded VLM, or a Hub name or folder.
            token_merger, layer_pruner: the learned stages, as modules or configurations (fresh weights).
            strategy, keep: a training-free strategy and the tokens it leaves per image.
            options: further fields of `PrunedVLMConfig` (`pruning_mode`, `strategy_layer`, ...).
        """
        if isinstance(model, str):
            model = AutoModelForImageTextToText.from_pretrained(model)
        adapter_for(model)
        config = PrunedVLMConfig(
            base_model_name_or_path=model.config.name_or_path or None,
            base_config=model.config.to_dict(),
            token_merger=_as_dict(token_merger),
            layer_pruner=_as_dict(layer_pruner),
            strategy=strategy,
            keep=keep,
            **options,
        )
        pruned = cls(config, base=model)
        for name, part in (("token_merger", token_merger), ("layer_pruner", layer_pruner)):
            if isinstance(part, PreTrainedModel):
                setattr(pruned, name, part)
            elif part is not None:
                getattr(pruned, name).to(dtype=model.dtype, device=model.device)
        return pruned.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the heads, and the base model from where the configuration says; takes `dtype`, `device_map`, ..."""
        return load_pruned_vlm(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory, include_base: bool = False, **kwargs):
        """Saves the heads and the reference to the base.

        Args:
            save_directory: folder.
            include_base: also save the whole base model, in the subfolder `base`.
        """
        save_pruned_vlm(self, super().save_pretrained, save_directory, include_base, **kwargs)

    # ------------------------------------------------------------------ small properties
    @property
    def pruning_mode(self) -> str:
        """`origin`, `merge_only`, `soft` or `hard`."""
        return self._mode

    @pruning_mode.setter
    def pruning_mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"pruning_mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self._mode = self.config.pruning_mode = mode

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self):
        self.base.gradient_checkpointing_disable()

    def token_report(self) -> dict:
        """Tokens per layer, FLOPs and KV memory of the last prompt; see `token_report.token_report`."""
        if self._report is None:
            raise ValueError("token_report() describes the last prompt; run the model or generate first.")
        return token_report(self, **self._report)

    # ------------------------------------------------------------------ the decoder
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: PrunedCache | None = None,
        past_key_values: PrunedCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        pruning_mode: str | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **inputs,
    ) -> PrunedVLMOutput:
        """One pass over a prompt, or over new tokens where `cache` holds a prompt.

        Args:
            input_ids: `(batch, length)`, image placeholders included.
            attention_mask: `(batch, length)`, padding on either side.
            cache, past_key_values: a `PrunedCache` under its new or its old name; an empty one, or `use_cache=True`,
                starts a cache.
            labels: `(batch, length)`, -100 where there is nothing to learn. The heads read the text before them.
            pruning_mode: overrides the model's mode for this call.
            inputs: what the processor gives for the images.
        """
        mode = self._mode if pruning_mode is None else pruning_mode
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = PrunedCache(config=self.adapter.text_config)
        if cache is not None and not isinstance(cache, PrunedCache):
            raise TypeError(f"PrunedVLM needs a PrunedCache (or use_cache=True), got {type(cache).__name__}.")
        if cache is not None and cache.segments:
            return self._decode(input_ids, cache, logits_to_keep)
        length = input_ids.shape[1]
        if cache is not None and cache.prompt is not None:
            stream, details = cache.prompt.repeat(len(input_ids) // len(cache.prompt.hidden)), {}
            cache.prompt = None
        else:
            stream, details = self.prepare_prompt(input_ids, attention_mask, position_ids, labels, mode, **inputs)
            self._report = details["counts"]
        if cache is not None:
            cache.next_position = stream.positions.reshape(-1, *stream.positions.shape[-2:]).amax((0, -1)) + 1
        collected: dict = {"soft_masks": [], "keep_masks": [], "keep_logits": [], "keep_rates": [], "kept_index": []}
        states: list | None = [] if output_hidden_states else None
        stream = run_layers(self, stream, mode, cache, collected, states, length)
        if self._report is not None:
            self._report |= {"kept_index": collected["kept_index"], "question": stream.question.sum(-1), "mode": mode}
        hidden = stream.restore(self.adapter.text_model.norm(stream.hidden), length)
        if states is not None:
            states.append(hidden)
        logits = self.base.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return PrunedVLMOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=None if states is None else tuple(states),
            merge_weights=tuple(details.get("merge_weights", ())) or None,
            merge_sparsity_loss=details.get("merge_sparsity_loss"),
            **{name: tuple(values) or None for name, values in collected.items()},
        )

    def _decode(self, input_ids, cache: PrunedCache, logits_to_keep: int) -> PrunedVLMOutput:
        hidden = decode(self.adapter, self.get_input_embeddings()(input_ids), cache)
        logits = self.base.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return PrunedVLMOutput(logits=logits, cache=cache)

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(self, inputs=None, **kwargs):
        """`GenerationMixin.generate` on the reduced prompt; takes the processor's inputs.

        Raises:
            ValueError: `use_cache=False` (heads would read their own answer) or a cache implementation.
        """
        if kwargs.get("use_cache") is False:
            raise ValueError("PrunedVLM generates with a KV cache only; leave use_cache out.")
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("PrunedVLM brings its own cache; leave cache_implementation out.")
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise ValueError("generate needs input_ids; call it with the processor's output.")
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        names = (*self.adapter.image_inputs, "mm_token_type_ids", "pixel_values_videos", "video_grid_thw")
        images = {name: kwargs.pop(name) for name in names if name in kwargs}
        positions = kwargs.pop("position_ids", None)
        cache = PrunedCache(config=self.adapter.text_config)
        cache.prompt, details = self.prepare_prompt(input_ids, mask, positions, **images)
        self._report = details["counts"]
        return super().generate(input_ids=input_ids, attention_mask=mask, **{CACHE: cache}, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, cache=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        cache = one_cache(cache, past_key_values)
        if cache is not None and cache.segments:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }


def _as_dict(part) -> dict | None:
    if part is None:
        return None
    config = part.config if isinstance(part, PreTrainedModel) else part
    return {name: getattr(config, name) for name in type(config).__annotations__ if not name.startswith("_")}
