"""`PrunedVLM`: any supported vision-language model with fewer vision tokens.

Stage 1 works before the language model: a `TokenMerger` or a training-free strategy turns an image's tokens into fewer.
Stage 2 works inside it: before chosen layers a `LayerPruner` (or FastV) decides which vision tokens go on. In `hard`
mode the others are removed from hidden states, masks and KV cache; positions of what stays do not change.
"""

import os
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_pruned_vlm import PrunedVLMConfig, checked_mode
from .configuration_pruning_layer_pruner import LayerPrunerConfig
from .configuration_pruning_token_merger import TokenMergerConfig
from .modeling_pruning_layer_pruner import LayerPruner
from .modeling_pruning_token_merger import TokenMerger
from .pruning_checks import check_cached_turn, check_generation, check_stages, refuse_attentions
from .pruning_decoder import decode, run_layers
from .pruning_families import adapter_for
from .pruning_files import load_base, load_pruned_vlm, save_pruned_vlm
from .pruning_output import PrunedVLMOutput
from .pruning_prompt import VisionReduction
from .pruning_report import LastPrompt, token_report
from .pruning_stream import Prompt, PrunedCache
from .shared_cache_name import CACHE, one_cache
from .shared_wrapped_base import check_ids, computed_buffers_kept

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_pruned_vlm import PrunedImageTextToTextPipeline  # noqa: F401


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
    # Trained at small learning rates, which bfloat16 weights would mostly round away.
    _keep_in_fp32_modules_strict = ["token_merger", "layer_pruner"]

    def __init__(self, config: PrunedVLMConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        if base is None:
            attention = config._attn_implementation
            options = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
            base = AutoModelForImageTextToText.from_config(
                config.make_base_config(), dtype=torch.get_default_dtype(), **options
            )
        else:
            # Its weights are there already: `post_init` must not draw them again.
            for module in base.modules():
                module._is_hf_initialized = True
        self.base = base
        self.adapter = adapter_for(base)
        self.token_merger = self.layer_pruner = None
        if config.token_merger is not None:
            self.token_merger = TokenMerger(TokenMergerConfig(**config.token_merger))
        if config.layer_pruner is not None:
            self.layer_pruner = LayerPruner(LayerPrunerConfig(**config.layer_pruner))
        check_stages(self)
        self.generation_config = base.generation_config
        self.temperature = 0.1
        self._last_prompt = LastPrompt()
        self.post_init()

    # ------------------------------------------------------------------ building, saving, loading
    @classmethod
    def from_base(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        token_merger: TokenMerger | TokenMergerConfig | None = None,
        layer_pruner: LayerPruner | LayerPrunerConfig | None = None,
        strategy: str | None = None,
        keep: int | None = None,
        *,
        strategy_layer: int = 2,
        strategy_seed: int = 0,
        pruning_mode: str = "hard",
        **loading,
    ) -> "PrunedVLM":
        """Wraps a VLM.

        Args:
            model: a loaded VLM, or a Hub name or folder.
            token_merger, layer_pruner: the learned stages, as modules or configurations (fresh weights, in float32
                whatever the VLM's precision, so that small learning rates move them).
            strategy, keep: a training-free strategy and the tokens it leaves per image.
            strategy_layer, strategy_seed, pruning_mode: see `PrunedVLMConfig`.
            loading: where `model` is a name, options of `from_pretrained` for it: `dtype`, `device_map`,
                `attn_implementation`, `revision`, `token`, `trust_remote_code`, ...

        Raises:
            TypeError: a keyword that is not known, or loading options for a model that is loaded already.
            ValueError: a family that is not supported, or stages that do not fit the VLM.
        """
        if isinstance(model, str | os.PathLike):
            model = load_base(model, **loading)
        elif loading:
            raise TypeError(
                f"PrunedVLM.from_base does not take {', '.join(map(repr, sorted(loading)))} with a loaded model; "
                "options of loading go with the name of a model."
            )
        adapter_for(model)
        config = PrunedVLMConfig(
            base_model_name_or_path=model.config.name_or_path or None,
            base_revision=loading.get("revision") or getattr(model.config, "_commit_hash", None),
            base_config=model.config.to_dict(),
            token_merger=_as_dict(token_merger),
            layer_pruner=_as_dict(layer_pruner),
            strategy=strategy,
            keep=keep,
            strategy_layer=strategy_layer,
            strategy_seed=strategy_seed,
            pruning_mode=pruning_mode,
        )
        pruned = cls(config, base=model)
        for name, part in (("token_merger", token_merger), ("layer_pruner", layer_pruner)):
            if isinstance(part, PreTrainedModel):
                setattr(pruned, name, part)
            elif part is not None:
                getattr(pruned, name).to(device=pruned.head_device, dtype=torch.float32)
        return pruned.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the heads, and the base model from where the configuration says.

        `dtype`, `device_map` and the like are the base's; without `dtype` the base comes in the precision it was saved
        in. The heads keep their own. Fields of `PrunedVLMConfig` may be given, for example `pruning_mode`.
        """
        return load_pruned_vlm(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, include_base: bool | None = None, **kwargs):
        """Saves the heads with a reference to the base, or everything.

        Args:
            save_directory: folder.
            include_base: True: the whole base too, in the subfolder `base`. None: only where its reference would not
                give it back, because it was trained, merged, cast, resized or built in memory; its weights are then
                in the folder's own files, where a resumed training finds them. False: never.
        """
        save_pruned_vlm(self, super().save_pretrained, save_directory, include_base, **kwargs)

    # ------------------------------------------------------------------ small properties
    @property
    def pruning_mode(self) -> str:
        """`origin`, `merge_only`, `soft` or `hard`."""
        return self.config.pruning_mode

    @pruning_mode.setter
    def pruning_mode(self, mode: str) -> None:
        self.config.pruning_mode = checked_mode(mode)

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resizes the base model's input embeddings and head; arguments as in transformers."""
        table = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base_config = self.base.config.to_dict()
        return table

    def _apply(self, *args, **kwargs):
        with computed_buffers_kept(self):
            return super()._apply(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected; of an offloaded model not where its first weight happens to be."""
        return self.head_device

    @property
    def head_device(self) -> torch.device:
        """Where the heads and the prompt are: the device on which the base embeds its tokens."""
        table = self.base.get_input_embeddings()
        device = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
        return table.weight.device if device is None else torch.device(device)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self):
        self.base.gradient_checkpointing_disable()

    def token_report(self) -> dict:
        """Tokens per layer, FLOPs and KV memory of this thread's last prompt; see `token_report.token_report`."""
        if self._last_prompt.report is None:
            raise ValueError("token_report() describes the last prompt; run the model or generate first.")
        return token_report(self, **self._last_prompt.report)

    @property
    def image_tokens(self) -> list[int]:
        """Unpruned vision tokens of every image in this thread's last prompt."""
        return [] if self._last_prompt.report is None else self._last_prompt.report["image_tokens"]

    # ------------------------------------------------------------------ the decoder
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: PrunedCache | None = None,
        past_key_values: PrunedCache | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pruning_mode: str | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> PrunedVLMOutput | tuple:
        """One pass over a prompt, or over new text where `cache` holds a prompt.

        Args:
            input_ids: `(batch, length)`, image placeholders included.
            attention_mask: `(batch, length)`, padding on either side; with a filled cache its last columns count.
            position_ids: rotary positions, `(batch, length)` or `(3, batch, length)`, instead of the family's own.
            cache, past_key_values: a `PrunedCache` under its new or its old name; an empty one, or `use_cache=True`,
                starts a cache.
            labels: `(batch, length)`, -100 where there is nothing to learn. The heads read the text before them.
            pixel_values, image_sizes, image_grid_thw, batch_num_images: what the family's processor gives for images.
            mm_token_type_ids: accepted, for processors give it; image places are known from `input_ids`.
            logits_to_keep: logits of so many last places, or of these places; 0 for all.
            pruning_mode: overrides the model's mode for this call.

        Raises:
            ValueError: images or a mode for a cached turn, videos, `output_attentions`, images that do not match the
                prompt's placeholders.
        """
        refuse_attentions(self.config.output_attentions if output_attentions is None else output_attentions)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        images = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "image_grid_thw": image_grid_thw,
            "batch_num_images": batch_num_images,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
        }
        if input_ids is None:
            raise ValueError("PrunedVLM needs input_ids: it finds the images by their placeholders.")
        check_ids(input_ids)
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = PrunedCache()
        if cache is not None and not isinstance(cache, PrunedCache):
            raise TypeError(f"PrunedVLM needs a PrunedCache (or use_cache=True), got {type(cache).__name__}.")
        states: list | None = [] if wants_states else None
        collected: dict = {}
        if cache is not None and cache.segments:
            check_cached_turn(cache, images, pruning_mode, use_cache)
            embedded = self.get_input_embeddings()(input_ids)
            hidden = decode(self.adapter, embedded, cache, attention_mask, position_ids, states)
        else:
            mode = self.pruning_mode if pruning_mode is None else checked_mode(pruning_mode)
            if cache is not None and cache.prompt is not None:
                prompt, cache.prompt = cache.prompt.repeat(len(input_ids)), None
            else:
                prompt = self.prepare_prompt(input_ids, attention_mask, position_ids, labels, images, mode)
            hidden, collected = self._run_prompt(prompt, cache, states, input_ids.shape[1])
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.base.lm_head(hidden[:, places if isinstance(logits_to_keep, int) else logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = PrunedVLMOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=None if states is None else tuple(states),
            **collected,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _run_prompt(self, prompt: Prompt, cache: PrunedCache | None, states: list | None, length: int):
        """Final hidden states `(batch, length, hidden)` of a prompt and the fields of the output that tell of pruning."""
        stream = prompt.stream
        if self.adapter.window is not None:
            self.adapter.check_window(int(stream.positions.max()) + 1)
        if cache is not None:
            cache.next_position = stream.positions.reshape(-1, *stream.positions.shape[-2:]).amax((0, -1)) + 1
            cache.mode = prompt.mode
        names = ("soft_masks", "keep_masks", "keep_logits", "keep_rates", "kept_index")
        collected: dict = {name: [] for name in names}
        stream = run_layers(self, stream, prompt.mode, cache, collected, states, length)
        asked = stream.question.sum(-1)
        report = prompt.counts | {"kept_index": collected["kept_index"], "question": asked, "mode": prompt.mode}
        self._last_prompt.report = report
        if cache is not None:
            cache.report = report
        hidden = stream.restore(self.adapter.text_model.norm(stream.hidden), length)
        if states is not None:
            states.append(hidden)
        return hidden, prompt.merged | {name: tuple(values) or None for name, values in collected.items()}

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pruning_mode: str | None = None,
        **options,
    ):
        """`GenerationMixin.generate` on the reduced prompt.

        Args:
            inputs, input_ids: prompt ids `(batch, length)` under either name; they and the arguments up to
                `mm_token_type_ids` are what the processor gives, as for `forward`.
            pruning_mode: overrides the model's mode for this call.
            options: generation options, logits processors, a streamer and the like.

        Returns:
            Ids `(batch, length + new)`; with `return_dict_in_generate=True` an output that also holds `token_report`,
            the dictionary that `token_report()` gives for this prompt.

        Raises:
            ValueError: options that would not act: `use_cache=False` (heads would read their own answer), a cache or a
                cache implementation, `labels`, `output_attentions`, videos, and names that nothing takes.
        """
        if input_ids is not None and inputs is not None:
            raise ValueError("inputs and input_ids are two names of one argument; give one of them.")
        input_ids = inputs if input_ids is None else input_ids
        check_generation(self, input_ids, generation_config, options)
        mode = self.pruning_mode if pruning_mode is None else checked_mode(pruning_mode)
        images = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "image_grid_thw": image_grid_thw,
            "batch_num_images": batch_num_images,
        }
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = PrunedCache()
        cache.prompt = self.prepare_prompt(input_ids, mask, position_ids, None, images, mode)
        output = super().generate(
            input_ids=input_ids, attention_mask=mask, generation_config=generation_config, **{CACHE: cache}, **options
        )
        # Classifier-free guidance runs prompts of its own in between.
        self._last_prompt.report = cache.report
        if not torch.is_tensor(output):
            output["token_report"] = token_report(self, **cache.report)
        return output

    def prepare_inputs_for_generation(
        self, input_ids, cache=None, attention_mask=None, past_key_values=None, output_hidden_states=None, **kwargs
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
            "output_hidden_states": output_hidden_states,
        }


def _as_dict(part) -> dict | None:
    if part is None:
        return None
    config = part.config if isinstance(part, PreTrainedModel) else part
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"token_merger and layer_pruner are modules or configurations, got {type(part).__name__}; write "
            "TokenMergerConfig(...) or LayerPrunerConfig(...)."
        )
    return {name: getattr(config, name) for name in type(config).__annotations__ if not name.startswith("_")}
